"""Gemma 3, text: windows in five of six layers, with rotations of their own; norms before and after; GeGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.families import gemma2
from llm_infer.models.hf_config import ConfigReader
from llm_infer.weights.gguf_names import QK_NORMS

rules = gemma2.rules
IGNORED_TENSORS = gemma2.IGNORED_TENSORS
GGUF = gemma2.gguf_names("gemma3_text", 62, QK_NORMS, {"rope.freq_base_swa": "rope_local_base_freq"})
_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""What transformers assumes where the config is silent: published ones leave out what is as in the 4B model."""


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Gemma3TextConfig`."""
    reader = ConfigReader(_DEFAULTS | {key: value for key, value in values.items() if value is not None})
    # Null in all that are published; transformers has the key and does not use it.
    reader.expect("attn_logit_softcapping", None)
    pattern = reader.integer("sliding_window_pattern", reader.integer("_sliding_window_pattern", 6))
    kinds = reader.layer_kinds(pattern)
    result = ModelConfig(
        "Gemma3ForCausalLM",
        **gemma2.common_fields(reader),
        **reader.layer_ropes(kinds, 1e6, 1e4),
        windows=reader.layer_windows(reader.integer("sliding_window", 4096), kinds),
        qk_norm=True,
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
