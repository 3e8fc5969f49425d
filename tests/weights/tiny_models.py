"""Tiny model files for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize

# V E F L Hq Hkv D of the tiny Llama; widths are multiples of 32 so that Q4 and Q8 blocks fill its rows.
V, E, F, L, HQ, HKV, D = 48, 64, 96, 2, 4, 2, 16


def hf_tensors(*, tied: bool = True, seed: int = 0, vocab_size: int = V) -> dict[str, np.ndarray]:
    """Random float32 tensors of a tiny Llama under Hugging Face names."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, E), "model.norm.weight": (E,)}
    for layer in range(L):
        block = f"model.layers.{layer}."
        shapes |= {
            block + "input_layernorm.weight": (E,),
            block + "self_attn.q_proj.weight": (HQ * D, E),
            block + "self_attn.k_proj.weight": (HKV * D, E),
            block + "self_attn.v_proj.weight": (HKV * D, E),
            block + "self_attn.o_proj.weight": (E, HQ * D),
            block + "post_attention_layernorm.weight": (E,),
            block + "mlp.gate_proj.weight": (F, E),
            block + "mlp.up_proj.weight": (F, E),
            block + "mlp.down_proj.weight": (E, F),
        }
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, E)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": HQ,
    "num_key_value_heads": HKV,
    "head_dim": D,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    base = name.removesuffix(".weight")
    if base.startswith("model.layers."):
        layer, base = base.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_TO_GGUF[base]}.weight"
    return _TO_GGUF[base] + ".weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (half, pair) to (pair, half), as llama.cpp's converter does for Llama's q and k."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    types: dict[str, GGMLQuantizationType] | None = None,
    *,
    architecture: str = "llama",
    extra: dict[str, Any] | None = None,
    rope_factors: np.ndarray | None = None,
    vocabulary: dict[str, Any] | None = None,
    tokens: list[str] | None = None,
) -> Path:
    """Write a tiny Llama as llama.cpp's converter would. `types` maps Hugging Face names to storage types.

    `vocabulary`: GGUF keys of a tokenizer; without it there are only `tokens`, by default such as serve no text.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_uint32(f"{architecture}.vocab_size", len(vocabulary["tokenizer.ggml.tokens"]) if vocabulary else V)
    writer.add_context_length(128)
    writer.add_embedding_length(E)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HQ)
    writer.add_head_count_kv(HKV)
    writer.add_rope_dimension_count(D)
    writer.add_layer_norm_rms_eps(1e-5)
    if vocabulary is None:
        vocabulary = {
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.tokens": tokens or [f"token {i} é" for i in range(V)],
            "tokenizer.ggml.token_type": [1] * V,
        }
    for key, value in vocabulary.items():
        kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    for key, value in (extra or {}).items():
        writer.add_key_value(key, *value)
    for name, values in tensors.items():
        if name.endswith("q_proj.weight"):
            values = interleave(values, HQ)
        elif name.endswith("k_proj.weight"):
            values = interleave(values, HKV)
        kind = (types or {}).get(name, GGMLQuantizationType.F32)
        writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
