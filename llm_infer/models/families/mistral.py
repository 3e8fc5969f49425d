"""Mistral: Llama, the first version with a window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, llama_rules

rules = llama_rules
IGNORED_TENSORS = LLAMA_IGNORED


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `MistralConfig`."""
    reader = ConfigReader({"num_key_value_heads": 8, "sliding_window": 4096, **values})
    result = ModelConfig(
        "MistralForCausalLM", **reader.llama_like(), windows=reader.sliding_windows(), fused_qkv=fused_qkv
    )
    reader.finish()
    return result
