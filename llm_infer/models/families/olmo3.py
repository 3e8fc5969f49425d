"""OLMo 3: OLMo 2 with windows in three of four layers, whose rotations are not scaled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import AFTER_NORMS, LLAMA_IGNORED, llama_rules

rules = partial(llama_rules, norms=AFTER_NORMS)
IGNORED_TENSORS = LLAMA_IGNORED


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Olmo3Config`."""
    reader = ConfigReader({"rms_norm_eps": 1e-5, **values})
    kinds = reader.layer_kinds(4)
    result = ModelConfig(
        "Olmo3ForCausalLM",
        **reader.sizes(),
        **reader.layer_ropes(kinds, 500000.0),
        windows=reader.layer_windows(reader.integer("sliding_window", 4096), kinds),
        activation=reader.activation(),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        **reader.attention_biases(),
        qk_norm_whole=True,
        norms="after",
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
