"""Qwen3, dense: Llama with RMS-normalised queries and keys, and a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import ATTENTION_BIAS, DENSE_LAYER, QK_NORMS, GGUFNames

rules = llama_rules
IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames("qwen3", DENSE_LAYER | QK_NORMS, flags=ATTENTION_BIAS)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Qwen3Config`."""
    # transformers assumes a head size of 128 where the config is silent.
    reader = ConfigReader({"head_dim": 128, **values})
    windows = reader.windows()
    result = ModelConfig(
        "Qwen3ForCausalLM",
        **reader.llama_like(),
        **reader.attention_biases(),
        qk_norm=True,
        windows=windows,
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
