"""Phi-3, Phi-3.5 and Phi-4: Llama whose files have queries, keys and values, and gates and ups, in one matrix each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, gate_up_rules, llama_rules, one_qkv_rules
from llm_infer.weights.gguf_names import DENSE_LAYER, WINDOW_KEYS, GGUFNames

rules = partial(llama_rules, qkv=one_qkv_rules, mlp_rules=gate_up_rules)
IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames(
    "phi3",
    {name: hf for name, hf in DENSE_LAYER.items() if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
    | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    keys=WINDOW_KEYS,
    partial_rotary=True,
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Phi3Config`."""
    reader = ConfigReader({"rms_norm_eps": 1e-5, **values})
    fields = reader.llama_like(partial=True, original=reader.optional_integer("original_max_position_embeddings"))
    reader.take("embd_pdrop", 0.0)  # of training
    result = ModelConfig("Phi3ForCausalLM", **fields, windows=reader.sliding_windows(), fused_qkv=fused_qkv)
    reader.finish()
    return result
