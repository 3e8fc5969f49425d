"""Configurations: every key is handled, ignored by name or refused; architectures are the published ones, to the weight."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.base.errors import ModelError, UserError
from llm_infer.models import params
from llm_infer.models.architectures import architecture_config, architecture_names, read_architecture, table
from llm_infer.models.config import RopeConfig
from llm_infer.models.load import dummy_model
from llm_infer.models.params import num_parameters, random_params, split_model
from llm_infer.models.registry import FAMILIES, family
from llm_infer.models.rotary import frequencies
from llm_infer.weights.sources import read_json
from tests.models import closed_form
from tests.models.family_checkpoints import FOLDER, NAMES, load

# Numbers of parameters as the Hugging Face hub states them; of Gemma 3 from 4B on without the 416,866,032 of its vision tower
# and the projector, 1152 · (E + 1).
PUBLISHED = {
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "gemma-3-27b": 27_009_346_304,
    "gemma-3-4b": 3_880_263_168,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4.5-air": 106_852_251_264,  # without the layer that predicts further tokens
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-8b-a1b": 8_339_930_560,  # with the experts' biases
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "ministral-3-8b": 8_489_553_920,
    "minimax-m2": 228_689_764_864,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "olmo-2-7b": 7_298_617_344,
    "olmo-3-7b": 7_298_011_136,
    "opt-125m": 125_239_296,
    "opt-13b": 12_853_473_280,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
}


def test_the_architectures_are_those_published() -> None:
    assert {name: num_parameters(architecture_config(name)) for name in architecture_names()} == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_modules_declare_is_the_closed_form(name: str) -> None:
    for fused_qkv in (True, False):
        config = architecture_config(name, fused_qkv=fused_qkv)
        _, specs = split_model(config, jnp.bfloat16)
        assert sum(spec.size for spec in specs.values()) == closed_form.num_parameters(config)
        kept = jnp.float32 if config.add_one_to_norms else jnp.bfloat16
        assert all(
            spec.dtype == (jnp.float32 if "correction" in key else kept if "norm" in key else jnp.bfloat16)
            for key, spec in specs.items()
        )
        assert len(specs) <= 25
    # The rules name every parameter once and no other.
    rules = family(read_architecture(name)).rules(config)
    assert sorted(rule.param for rule in rules if rule.param in specs or not rule.optional) == sorted(specs)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_a_loaded_model_takes(name: str) -> None:
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        model = load(name, dtype=dtype)
        norms = sum(value.size for key, value in model.params.items() if "norm" in key)
        kept = (4 - itemsize) * norms if model.config.add_one_to_norms else 0
        kept += (4 - itemsize) * sum(value.size for key, value in model.params.items() if "correction" in key)
        expected = itemsize * closed_form.num_parameters(model.config) + kept
        assert sum(array.nbytes for array in model.params.values()) == expected


def test_memory_of_random_weights() -> None:
    config = architecture_config("smollm2-135m")
    assert sum(array.nbytes for array in random_params(config, jnp.bfloat16).values()) == 269_030_016


def test_random_weights_that_do_not_fit() -> None:
    huge = replace(architecture_config("llama-3.1-405b"), vocab_size=2**31 - 1)
    with pytest.raises(UserError, match=r"GB of random weights do not fit into memory: take a smaller architecture"):
        dummy_model(huge)


def test_the_table() -> None:
    lines = {line.split()[0]: line.split() for line in table().splitlines() if line.strip()}
    assert lines["opt-13b"][1:] == [
        "12,853,473,280",
        "51.41",
        "25.71",
        "1,638,400",
        "819,200",
        "1,677.7",
        "0.00",
        "2,048",
    ]
    assert lines["lfm2-1.2b"][-3:] == ["100.7", "0.08", "128,000"]  # 10 layers keep 2 inputs of 2048 channels
    assert lines["gemma-3-1b"][-3] == "45.1"  # 4 layers keep 8192 tokens, 22 their window of 512
    lines = {line.split()[0]: line.split() for line in table(512).splitlines() if line.strip()}
    assert lines["gemma-3-1b"][-3] == "13.6"
    assert lines.keys() >= PUBLISHED.keys()
    with pytest.raises(ModelError, match=r"no architecture 'gpt-5'; there are gemma-2-27b"):
        read_architecture("gpt-5")


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_refused(name: str) -> None:
    values = read_json(FOLDER / name / "config.json")
    with pytest.raises(ModelError, match="keys this architecture does not know: attention_twist"):
        family(values).config(values | {"attention_twist": 1})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama_mha", {"hidden_act": "relu2"}, "hidden_act='relu2' is not supported"),
        ("llama_mha", {"mlp_bias": 1}, "mlp_bias=1, expected true or false"),
        ("llama_mha", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ("llama_mha", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "rope scaling 'ntk'"),
        (
            "llama_mha",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 1}},
            "a beta_fast above beta_slow",
        ),
        ("llama_mha", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan, expected a finite positive number"),
        ("llama_mha", {"vocab_size": "many"}, "vocab_size='many', expected a positive whole number"),
        ("llama_mha", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes', expected true or false"),
        ("qwen3_moe_mha", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        (
            "qwen2_window",
            {"layer_types": ["full_attention"]},
            "layer_types has 1 entries, expected num_hidden_layers=3",
        ),
        ("qwen2_window", {"sliding_window": 0}, "sliding_window=0, expected a positive whole number"),
        ("qwen2_window", {"max_window_layers": -1}, "max_window_layers=-1, expected a whole number"),
        ("qwen2_window", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention'"),
        ("qwen2_mha", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ("qwen2_mha", {"attention_bias": True}, "does not know: attention_bias"),
        ("qwen3_moe_mha", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        ("qwen3_moe_mha", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("glm4_moe_gqa", {"first_k_dense_replace": 9}, "first_k_dense_replace=9 is more than num_hidden_layers=4"),
        ("glm4_moe_gqa", {"topk_group": 5}, "n_group=4, topk_group=5: expected a part of the groups"),
        ("qwen3_moe_mha", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
        ("opt_pre", {"activation_function": "gelu"}, "activation_function='gelu'"),
        ("opt_pre", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
    ],
)
def test_what_would_change_the_computation_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    values = read_json(FOLDER / name / "config.json")
    with pytest.raises(ModelError, match=message):
        family(values).config(values | change)


def test_factors_follow_the_longest_sequence() -> None:
    values = read_json(FOLDER / "phi3_longrope" / "config.json")
    config = family(values).config(values)
    plain = frequencies(RopeConfig(fraction=0.75), config.head_dim)
    for length, divisors in ((None, [1.0, 2.5, 7.0]), (9, [1.0, 2.5, 7.0]), (8, [1.0, 1.1, 1.5])):
        chosen = config.for_length(length).rope
        assert chosen is not None
        np.testing.assert_allclose(frequencies(chosen, config.head_dim), plain / np.array(divisors), rtol=1e-6)
    assert config.for_length(None) == config == config.for_length(64)


def test_unknown_architectures() -> None:
    with pytest.raises(ModelError, match=r"'MambaForCausalLM' is not supported; the nearest is LlamaFor.*Gemma3.*OPT"):
        family({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(ModelError, match="expected a list with one name"):
        family({})


def test_a_family_is_known_to_its_file_and_its_row_alone() -> None:
    root = Path(params.__file__).parents[1]
    apart = {root / "models" / "registry.py", *(root / "models" / "families").glob("*.py")}
    for path in set(root.rglob("*.py")) - apart:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("llm_infer.models.families"), path
            elif isinstance(node, ast.Constant):
                assert node.value not in FAMILIES, path
