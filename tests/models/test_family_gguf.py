"""Families from GGUF files as llama.cpp's converter writes them: the same config and parameters as from safetensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize

from llm_infer.base.progress import Progress
from llm_infer.models.load import LoadedModel, compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.quant import StoredWeights
from llm_infer.weights.gguf_names import GGUFNames
from llm_infer.weights.sources import read_json, resolve
from tests.models.block_files import write_llama
from tests.models.family_checkpoints import FOLDER, dense, load

# Architectures whose q and k rows the converter reorders from (half, pair) to (pair, half) within a head.
INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")
MORE_NUMBERS = {
    "sliding_window": "add_sliding_window",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
    "n_group": "add_expert_group_count",
    "topk_group": "add_expert_group_used_count",
    "n_shared_experts": "add_expert_shared_count",
    "first_k_dense_replace": "add_leading_dense_block_count",
    "num_dense_layers": "add_leading_dense_block_count",
    "routed_scaling_factor": "add_expert_weights_scale",
    "conv_L_cache": "add_shortconv_l_cache",
    "num_nextn_predict_layers": "add_nextn_predict_layers",
}
"""Key of config.json → the writer's method."""


def write_gguf(path: Path, name: str, architecture: str, kind: Callable[[str], str] = lambda _: "F32") -> None:
    """One of the tiny checkpoints as GGUF; `kind` names the block type of a matrix, by its name in the file.

    Names of tensors are those of llama.cpp's own table.
    """
    config = read_json(FOLDER / name / "config.json")
    tensors = open_model(resolve(str(FOLDER / name))).tensors
    writer, heads = GGUFWriter(path, architecture), config["num_attention_heads"]
    (number,) = (each for each, known in MODEL_ARCH_NAMES.items() if known == architecture)
    layers, more = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    names = get_tensor_name_map(number, layers + more)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers + more)
    writer.add_feed_forward_length(load(name).config.intermediate_size)
    writer.add_head_count(heads)
    kinds = config.get("layer_types") or []
    kv_heads = config["num_key_value_heads"]
    writer.add_head_count_kv([0 if each == "conv" else kv_heads for each in kinds] if "conv" in kinds else kv_heads)
    writer.add_layer_norm_rms_eps(config["norm_eps" if "norm_eps" in config else "rms_norm_eps"])
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "llama_4_scaling_beta" in rope:
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        size = config.get("head_dim", config["hidden_size"] // heads)
        writer.add_rope_dimension_count(int(size * rope["partial_rotary_factor"]))
    for key, method in MORE_NUMBERS.items():
        if config.get(key) is not None:
            getattr(writer, method)(config[key])
    if "sliding_attention" in kinds:
        writer.add_sliding_window_pattern([each == "sliding_attention" for each in kinds])
    experts = next(
        (config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config), 0
    )
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if architecture != "llama":
            writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))
    if architecture in ("glm4moe", "lfm2moe"):
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if architecture == "glm4moe":
        writer.add_expert_weights_norm(config["norm_topk_prob"])

    def read(tensor: str) -> np.ndarray:
        out = np.empty(tensors.shape(tensor), np.float32)
        tensors.read_into(tensor, out)
        return out

    def add(tensor: str, values: np.ndarray) -> None:
        if (
            values.ndim == 1
            or tensor.endswith(".bias")
            or values.shape[-1] % 32
            or (type_ := GGMLQuantizationType[kind(tensor)]) == GGMLQuantizationType.F32
        ):
            writer.add_tensor(tensor, np.ascontiguousarray(values))
        else:
            writer.add_tensor(tensor, quantize(values, type_), raw_dtype=type_)

    for tensor in tensors.names:
        if ".experts." in tensor:
            continue
        values = read(tensor)
        base, _, suffix = tensor.rpartition(".")
        if tensor.endswith("sinks"):
            base, suffix = tensor, "weight"
        if tensor.endswith("correction_bias"):
            base, suffix = tensor.removesuffix("_bias"), "bias"
        if tensor.endswith("expert_bias"):
            base, suffix = tensor, "bias"
        if architecture.startswith("gemma") and tensor.endswith("norm.weight"):
            values += 1
        if tensor.endswith("conv.conv.weight"):
            values = values[:, 0]
        if architecture in INTERLEAVED and (found := re.search(r"([qk])_proj$", base)):
            count = heads if found[1] == "q" else config["num_key_value_heads"]
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        add(f"{names.get_name(base)}.{suffix}", values)
    parts = ("weight", "bias") if architecture == "gpt-oss" else ("weight",)
    dense_layers = config.get("first_k_dense_replace", config.get("num_dense_layers", 0))
    for layer in range(dense_layers, layers if experts else 0):
        for matrix, suffix in itertools.product(("gate", "up", "down"), parts):
            of_one = GGUFNames("").expert_names[matrix]
            if architecture in ("minimax-m2", "llama", "lfm2moe"):
                mlp = "feed_forward" if architecture == "lfm2moe" else "block_sparse_moe"
                of_one = f"{mlp}.experts.{{x}}.{dict(gate='w1', up='w3', down='w2')[matrix]}"
            block = f"model.layers.{layer}.{of_one}.{suffix}"
            stack = np.stack([read(block.replace("{x}", str(x))) for x in range(experts)])
            add(f"blk.{layer}.ffn_{matrix}_exps.{suffix}", stack)
    for tensor in ("nextn.eh_proj", "nextn.shared_head_norm", "attn_q", "ffn_gate_exps") if more else ():
        add(f"blk.{layers}.{tensor}.weight", np.ones((2, 32, 32) if "exps" in tensor else 32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *(("qwen2_gqa", "qwen2"), ("qwen3_mha", "qwen3"), ("qwen3_moe_gqa", "qwen3moe")),
        *(("gemma2_gqa", "gemma2"), ("gemma3_gqa", "gemma3"), ("gpt_oss_mha", "gpt-oss")),
        *(("granite_mha", "granite"), ("granite_gqa", "granite"), ("smollm3_mha", "smollm3")),
        *(("olmo2_gqa", "olmo2"), ("olmo3_mha", "olmo2"), ("glm4_mha", "glm4"), ("glm4_gqa", "glm4")),
        *(("phi3_mha", "phi3"), ("phi3_gqa", "phi3"), ("phi3_longrope", "phi3"), ("qwen2_moe_mha", "qwen2moe")),
        *(("minimax_m2_mha", "minimax-m2"), ("minimax_m2_gqa", "minimax-m2"), ("mixtral_gqa", "llama")),
        *(("glm4_moe_mha", "glm4moe"), ("glm4_moe_gqa", "glm4moe"), ("ministral3_mha", "mistral3")),
        *(("lfm2_gqa", "lfm2"), ("lfm2_moe_gqa", "lfm2moe")),
    ],
)
def test_gguf_gives_the_same_model(tmp_path: Path, name: str, architecture: str) -> None:
    write_gguf(tmp_path / "model.gguf", name, architecture)
    found = load_model(open_model(resolve(str(tmp_path / "model.gguf"))))
    expected = load(name)
    assert found.config == expected.config
    assert found.params.keys() == expected.params.keys()
    for param, values in expected.params.items():
        np.testing.assert_array_equal(found.params[param], values, err_msg=param)


# A type for each matrix of a Llama: all that kernels take and no other test of this file has.
WIDE = {
    "token_embd": "Q3_K",
    "blk.0.attn_q": "Q2_K",
    "blk.0.attn_k": "Q3_K",
    "blk.0.attn_v": "IQ4_XS",
    "blk.0.attn_output": "Q5_0",
    "blk.0.ffn_gate": "Q5_1",
    "blk.0.ffn_up": "IQ4_NL",
    "blk.0.ffn_down": "MXFP4",
}


def check_same(stored: LoadedModel, read: LoadedModel) -> None:
    """Checks logits, likeliest tokens and every layer's output against a model that was read as float32."""
    (logits, hidden), (expected, expected_hidden) = (dense(model, range(1, 32)) for model in (stored, read))
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(hidden, expected_hidden, atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def one_kind(_: str) -> str:
    return "Q4_1"


def more_bits_for_some_layers(tensor: str) -> str:
    return "Q8_0" if tensor in ("blk.0.ffn_down.weight", "blk.1.ffn_up.weight", "token_embd.weight") else "Q4_0"


def values_in_more_bits(tensor: str) -> str:
    return "Q8_0" if "attn_v" in tensor else "F16" if "ffn_down" in tensor else "Q4_1"


@pytest.mark.skipif(compute_dtype("auto", "exact")[1] is None, reason="needs the native CPU kernels")
@pytest.mark.parametrize(
    ("name", "architecture", "kind"),
    [
        ("qwen2_gqa", "qwen2", one_kind),
        ("qwen3_mha", "qwen3", more_bits_for_some_layers),
        ("qwen2_gqa", "qwen2", values_in_more_bits),
        ("qwen3_moe_gqa", "qwen3moe", one_kind),
        ("glm4_moe_gqa", "glm4moe", one_kind),
        ("mixtral_gqa", "llama", one_kind),
        ("lfm2_gqa", "lfm2", one_kind),
        ("lfm2_moe_gqa", "lfm2moe", one_kind),
    ],
)
def test_weights_that_stay_in_their_blocks_compute_the_same(
    tmp_path: Path, name: str, architecture: str, kind: Callable[[str], str]
) -> None:
    write_gguf(tmp_path / "model.gguf", name, architecture, kind)
    opened = open_model(resolve(str(tmp_path / "model.gguf")))
    stored, read = load_model(opened, stored="exact"), load_model(opened)
    up = stored.params["layers.mlp.up.weight"]
    assert isinstance(up, StoredWeights) and up.shape == read.params["layers.mlp.up.weight"].shape
    assert up.nbytes < read.params["layers.mlp.up.weight"].nbytes
    assert stored.config.fused_qkv == (kind is not values_in_more_bits)
    assert len(up.kinds) == (2 if kind is more_bits_for_some_layers else 1)
    for found, expected in zip(dense(stored, range(1, 12)), dense(read, range(1, 12)), strict=True):
        np.testing.assert_allclose(found, expected, atol=4e-5, rtol=1e-4)


@pytest.mark.skipif(compute_dtype("auto", "exact")[1] is None, reason="needs the native CPU kernels")
def test_every_type_of_blocks_stays_as_it_is(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", WIDE.__getitem__)
    opened, shown = open_model(resolve(str(tmp_path / "model.gguf"))), StringIO()
    stored, read = load_model(opened, stored="exact", progress=Progress(stream=shown)), load_model(opened)
    kept = {kind for value in stored.params.values() if isinstance(value, StoredWeights) for kind in value.kinds}
    assert kept == {kind.lower() for kind in WIDE.values()} and not shown.getvalue()
    check_same(stored, read)


@pytest.mark.skipif(compute_dtype("auto", "exact")[1] is None, reason="needs the native CPU kernels")
def test_a_type_without_a_kernel_is_read_and_named(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", (WIDE | {"blk.0.ffn_up": "TQ2_0"}).__getitem__)
    opened, shown = open_model(resolve(str(tmp_path / "model.gguf"))), StringIO()
    stored, read = load_model(opened, stored="exact", progress=Progress(stream=shown)), load_model(opened)
    assert "TQ2_0" in shown.getvalue() and "Q5_1" not in shown.getvalue()
    assert stored.params["layers.mlp.up.weight"].kinds == ("f32",)
    check_same(stored, read)


@pytest.mark.skipif(compute_dtype("auto", "exact")[1] is None, reason="needs the native CPU kernels")
def test_dense_weights_go_to_the_same_kernels(tmp_path: Path) -> None:
    source = open_model(resolve(str(FOLDER / "llama_gqa")))
    stored, read = load_model(source, stored="exact"), load_model(source)
    assert isinstance(stored.params["layers.mlp.down.weight"], StoredWeights)
    for found, expected in zip(dense(stored, range(1, 12)), dense(read, range(1, 12)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
