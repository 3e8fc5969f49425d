"""Families from GGUF files as llama.cpp's converter writes them: the same config and parameters as from safetensors."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from llm_infer.base.progress import Progress
from llm_infer.models.load import LoadedModel, compute_dtype, load_model
from llm_infer.quant import StoredWeights
from llm_infer.weights.safetensors_files import SafetensorsSource
from llm_infer.weights.sources import open_model, read_json, resolve
from tests.models.block_files import write_llama
from tests.models.family_checkpoints import FOLDER, dense, load

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, name: str, architecture: str, kind: Callable[[str], str] = lambda _: "F32") -> None:
    """One of the tiny checkpoints as GGUF; `kind` names the block type of a matrix, by its name in the file."""
    config = read_json(FOLDER / name / "config.json")
    source = SafetensorsSource.from_directory(FOLDER / name)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    experts = config.get("num_local_experts", 0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])

    def read(tensor: str) -> np.ndarray:
        out = np.empty(source.shape(tensor), np.float32)
        source.read_into(tensor, out)
        return out

    def add(tensor: str, values: np.ndarray) -> None:
        if (
            values.ndim == 1
            or values.shape[-1] % 32
            or (type_ := GGMLQuantizationType[kind(tensor)]) == GGMLQuantizationType.F32
        ):
            writer.add_tensor(tensor, values)
        else:
            writer.add_tensor(tensor, quantize(values, type_), raw_dtype=type_)

    for tensor in source.names:
        base, suffix = tensor.rsplit(".", 1)
        if base in GLOBAL:
            add(f"{GLOBAL[base]}.{suffix}", read(tensor))
        elif ".experts." not in base:
            _, _, layer, rest = base.split(".", 3)
            add(f"blk.{layer}.{LAYER[rest]}.{suffix}", read(tensor))
    for layer in range(config["num_hidden_layers"] if experts else 0):
        for part in ("gate", "up", "down"):
            block = f"model.layers.{layer}.mlp.experts"
            stack = np.stack([read(f"{block}.{x}.{part}_proj.weight") for x in range(experts)])
            add(f"blk.{layer}.ffn_{part}_exps.weight", stack)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "architecture"), [("qwen2_gqa", "qwen2"), ("qwen3_mha", "qwen3"), ("qwen3_moe_gqa", "qwen3moe")]
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
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


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
