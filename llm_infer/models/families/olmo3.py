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
    biased, sizes = reader.flag("attention_bias", False), reader.sizes()
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(sizes["num_layers"])]
    windows = reader.layer_windows(reader.integer("sliding_window", 4096), kinds)
    full, sliding = reader.ropes(500000.0)
    result = ModelConfig(
        "Olmo3ForCausalLM",
        **sizes,
        rope=full,
        layer_ropes=tuple(full if window is None else sliding for window in windows),
        windows=windows,
        activation=reader.activation(),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        qkv_bias=biased,
        output_bias=biased,
        qk_norm_whole=True,
        norms="after",
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
