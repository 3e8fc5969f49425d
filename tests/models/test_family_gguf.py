"""Families from GGUF files as llama.cpp's converter writes them: the same config and parameters as from safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from llm_infer.models.load import load_model
from llm_infer.weights.safetensors_files import SafetensorsSource
from llm_infer.weights.sources import open_model, read_json, resolve
from tests.models.family_checkpoints import FOLDER, load

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


def write_gguf(path: Path, name: str, architecture: str) -> None:
    """One of the tiny checkpoints as GGUF, float32."""
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

    for tensor in source.names:
        base, suffix = tensor.rsplit(".", 1)
        if base in GLOBAL:
            writer.add_tensor(f"{GLOBAL[base]}.{suffix}", read(tensor))
        elif ".experts." not in base:
            _, _, layer, rest = base.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{LAYER[rest]}.{suffix}", read(tensor))
    for layer in range(config["num_hidden_layers"] if experts else 0):
        for part in ("gate", "up", "down"):
            block = f"model.layers.{layer}.mlp.experts"
            stack = np.stack([read(f"{block}.{x}.{part}_proj.weight") for x in range(experts)])
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", stack)
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
