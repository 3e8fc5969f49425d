"""Qwen2 and Qwen2.5, dense: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import GGUFNames

rules = llama_rules
IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames("qwen2")


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Qwen2Config`."""
    reader = ConfigReader(values)
    windows = reader.windows()
    result = ModelConfig("Qwen2ForCausalLM", **reader.llama_like(), qkv_bias=True, windows=windows, fused_qkv=fused_qkv)
    reader.finish()
    return result
