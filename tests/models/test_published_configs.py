"""Published models load: keys at values that change nothing, other files beside the weights, heads the config denies."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from safetensors.numpy import load_file, save_file

from llm_infer.base.errors import ModelError
from llm_infer.models.config_keys import NEUTRAL
from llm_infer.models.load import load_model
from llm_infer.models.opened import gguf_model, open_model
from llm_infer.models.registry import family
from llm_infer.weights.gguf import GGUFFile
from llm_infer.weights.sources import read_json, resolve
from tests.models.family_checkpoints import FOLDER, NAMES, dense, golden
from tests.weights.tiny_models import CONFIG, HKV, HQ, L, hf_tensors, write_gguf

# What transformers 4 writes for every configuration, beside what says how it generates by default.
WRITTEN_BY_TRANSFORMERS_4: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": "bfloat16",
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "finetuning_task": None,
    "prefix": None,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "tokenizer_class": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "task_specific_params": None,
    "problem_type": None,
    "_name_or_path": "x",
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "top_k": 50,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "suppress_tokens": None,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": None,
}
PUBLISHED: list[dict[str, Any]] = [
    WRITTEN_BY_TRANSFORMERS_4,
    {"use_mrope": False},
    {"_attn_implementation_autoset": True},
    {"quantization_config": None},
    {"unsloth_version": "2025.1.1", "unsloth_fixed": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_length": 4096},
    {"partial_rotary_factor": 1.0},
    {"max_sequence_length": 2048, "pad_token_id": -1},
    {"final_logit_softcapping": None},
]


def config_of(name: str, change: dict[str, Any]) -> Any:
    values = read_json(FOLDER / name / "config.json")
    return family(values).config(values | change)


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_change_nothing_pass_and_others_do_not(name: str) -> None:
    plain = config_of(name, {})
    read = set(read_json(FOLDER / name / "config.json"))
    for change in PUBLISHED:
        others = {key: value for key, value in change.items() if key not in read}
        assert config_of(name, others) == plain, change
    for key, values in NEUTRAL.items():
        own = key == "use_qk_norm" and name.startswith("minimax")
        for value in values if key not in read and not own else ():
            assert config_of(name, {key: value}) == plain, key
    for change in (
        *(
            {"use_mrope": True},
            {"pruned_heads": {"0": [1]}},
            {"partial_rotary_factor": 0.5},
            {"rope_interleaved": True},
        ),
        *({"is_encoder_decoder": True}, {"quantization_config": {"quant_method": "awq"}}, {"unknown": False}),
        *({"embedding_multiplier": True}, {"final_logit_softcapping": 30.0}),
    ):
        turns_a_part = name.startswith(("glm4", "minimax", "phi3")) and "partial_rotary_factor" in change
        if not change.keys() & read and not turns_a_part:
            with pytest.raises(ModelError, match=rf"config\.json.*{next(iter(change))}"):
                config_of(name, change)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 1.0},
        {"rope_type": "dynamic", "type": "dynamic", "factor": 1},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64, "attention_factor": None},
        {"rope_type": "default", "factor": 1.0, "partial_rotary_factor": 1.0},
        {},
    ],
)
def test_scaling_by_one_is_none(scaling: dict[str, Any]) -> None:
    values = {key: value for key, value in read_json(FOLDER / "qwen2_mha" / "config.json").items() if "rope" not in key}
    plain = family(values).config(values)
    assert family(values).config(values | {"rope_scaling": scaling}) == plain
    assert family(values).config(values | {"rope_parameters": scaling | {"rope_theta": 10000.0}}) == plain


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64


@pytest.mark.parametrize(
    "change",
    [
        *({"rope_theta": theta} for theta in (0, -1, math.nan, math.inf, 0.5, 1e300, "x", True, [1], 10**400)),
        *({"rope_scaling": value} for value in (5, "linear", [1], True, {"type": []}, {"rope_type": 3})),
        *({"rope_scaling": {"type": "linear", "factor": factor}} for factor in (0, -1, math.nan, "1", True)),
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        *({"rope_scaling": LLAMA3 | {"factor": value}} for value in (0, 0.5, math.nan, "8", [8], 1e300)),
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 1.5}},
        *({"rms_norm_eps": eps} for eps in (0, -1e-5, 1e18, 2, math.inf, "x", True)),
        *({"max_position_embeddings": value} for value in (10**30, 2**31, 0, -1, 1.5, "x", True)),
        *({"vocab_size": value} for value in (10**30, [1], {})),
        *({"layer_types": value} for value in (5, "full_attention", [["full_attention"]], {"a": 1})),
        *({"hidden_act": value} for value in ([], {}, 1)),
        *({"attention_bias": value} for value in (0, "false", [])),
    ],
)
def test_values_that_cannot_be(change: dict[str, Any]) -> None:
    values = {key: value for key, value in read_json(FOLDER / "llama_mha" / "config.json").items() if "rope" not in key}
    with pytest.raises(ModelError) as caught:
        family(values).config(values | change)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_gguf_keys_that_change_nothing(tmp_path: Path) -> None:
    u32, f32, flag, text = (GGUFValueType[n] for n in ("UINT32", "FLOAT32", "BOOL", "STRING"))
    extra = {
        "llama.attention.causal": (True, flag),
        "llama.pooling_type": (0, u32),
        "llama.logit_scale": (1.0, f32),
        "llama.rope.scaling.attn_factor": (1.0, f32),
        "llama.tensor_data_layout": ("Meta AI original pth", text),
    }
    path = write_gguf(tmp_path / "a.gguf", hf_tensors(), extra=extra)
    assert gguf_model(GGUFFile(path))[0] == CONFIG
    for key, value in (("attention.causal", (False, flag)), ("logit_scale", (0.5, f32)), ("pooling_type", (1, u32))):
        path = write_gguf(tmp_path / "b.gguf", hf_tensors(), extra={f"llama.{key}": value})
        with pytest.raises(ModelError, match=f"not understood.*llama.{key}"):
            gguf_model(GGUFFile(path))[0]


def test_gguf_lists_of_equal_numbers_for_each_layer(tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", hf_tensors()))
    plain = {name: gguf_model(file)[1].row_order(name) for name in gguf_model(file)[1].names}
    lists = {
        "attention.head_count": HQ,
        "attention.head_count_kv": HKV,
        "feed_forward_length": CONFIG["intermediate_size"],
    }
    for key, value in lists.items():
        file.metadata[f"llama.{key}"] = np.full(L, value, np.int32)
    assert gguf_model(file)[0] == CONFIG
    for name, order in plain.items():
        np.testing.assert_array_equal(gguf_model(file)[1].row_order(name), order)
    for wrong in (np.array([HQ, HKV]), np.array([], np.int32), np.full(L, True), np.full(L, 4.0), [HQ, HQ]):
        file.metadata["llama.attention.head_count"] = wrong
        with pytest.raises(ModelError, match=r"llama\.attention\.head_count"):
            gguf_model(file)[0]


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(FOLDER / name, folder / name))


def test_other_files_beside_the_weights(tmp_path: Path) -> None:
    directory = copied("qwen3_gqa", tmp_path)
    other = {"other": np.zeros(1, np.float32)}
    for name in ("consolidated", "adapter_model", "consolidated.00-of-01"):
        save_file(other, directory / f"{name}.safetensors")
    stale = {"weight_map": {"gone": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(stale))
    expected = set(load_file(directory / "model.safetensors"))
    assert set(open_model(resolve(str(directory))).tensors.names) == expected
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model.safetensors").rename(directory / "weights.safetensors")  # the only one that can be meant
    assert set(open_model(resolve(str(directory))).tensors.names) == expected
    for name in ("consolidated", "consolidated.00-of-01", "weights"):
        (directory / f"{name}.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only an adapter \(adapter_model.safetensors\): give the directory"):
        open_model(resolve(str(directory)))


@pytest.mark.parametrize("name", [pytest.param("qwen3_gqa", marks=pytest.mark.sweep), "llama_gqa", "opt_pre"])
def test_a_head_that_differs_from_the_embedding_is_used(name: str, tmp_path: Path) -> None:
    """As in transformers 5; with the head's own values the logits are those of the untied model."""
    directory = copied(name, tmp_path)
    config = read_json(directory / "config.json")
    tensors = load_file(directory / "model.safetensors")
    embedding = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = np.random.default_rng(0).permutation(tensors[embedding])

    def logits(tied: bool, head: np.ndarray | None) -> np.ndarray:
        left = {key: value for key, value in tensors.items() if key != "lm_head.weight"}
        save_file(left if head is None else left | {"lm_head.weight": head}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        return dense(load_model(open_model(resolve(str(directory)))), golden(name).prompts[0])[0]

    own, shared = logits(False, tensors["lm_head.weight"]), logits(True, None)
    assert np.abs(own - shared).max() > 0.01
    np.testing.assert_array_equal(logits(True, tensors["lm_head.weight"]), own)
    np.testing.assert_array_equal(logits(True, tensors[embedding]), shared)
    with pytest.raises(ModelError, match=r"wrong shape \(1\): lm_head.weight"):
        logits(True, tensors["lm_head.weight"][:-1])
    # Saved under the head's name alone.
    tensors["lm_head.weight"] = tensors.pop(embedding)
    np.testing.assert_array_equal(logits(True, tensors["lm_head.weight"]), shared)


def test_every_tensor_is_used_or_known_to_be_needless(tmp_path: Path) -> None:
    directory = copied("llama_gqa", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    needless = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    save_file(tensors | needless, directory / "model.safetensors")
    load_model(open_model(resolve(str(directory))))
    for extra in ("lm_head.bias", "model.layers.0.self_attn.q_proj.weight_scale", "model.layers.9.mlp.up_proj.weight"):
        save_file(tensors | {extra: np.ones(4, np.float32)}, directory / "model.safetensors")
        with pytest.raises(ModelError, match=rf"surplus \(1\): {extra}"):
            load_model(open_model(resolve(str(directory))))
