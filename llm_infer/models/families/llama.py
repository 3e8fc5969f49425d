"""Llama 1–3.2 and models of the same shape (SmolLM2, TinyLlama …): their config keys and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import BIASES, GGUFNames

rules = llama_rules
IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames("llama", interleaved_rope=True, flags=BIASES)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `LlamaConfig`."""
    reader = ConfigReader(values)
    reader.same_layers()
    result = ModelConfig(
        "LlamaForCausalLM",
        **reader.llama_like(),
        **reader.attention_biases(),
        mlp_bias=reader.flag("mlp_bias", False),
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
