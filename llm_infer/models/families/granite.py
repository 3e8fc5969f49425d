"""Granite 3: Llama with multipliers of embeddings, residual sums, scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import BIASES, GGUFNames

rules = llama_rules
IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames(
    "granite",
    interleaved_rope=True,
    flags=BIASES,
    keys={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `GraniteConfig`."""
    reader = ConfigReader(values)
    result = ModelConfig(
        "GraniteForCausalLM",
        **reader.llama_like(),
        **reader.attention_biases(),
        mlp_bias=reader.flag("mlp_bias", False),
        embedding_scale=reader.number("embedding_multiplier", 1.0),
        residual_scale=reader.number("residual_multiplier", 1.0),
        attention_scale=reader.number("attention_multiplier", 1.0),
        logit_scale=1.0 / reader.number("logits_scaling", 1.0),
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
