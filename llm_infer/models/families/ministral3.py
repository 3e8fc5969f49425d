"""Ministral 3: Mistral with YaRN, and queries that grow with the position as Llama 4's do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.config_numbers import an_object, positive
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import GGUFNames

rules = llama_rules
IGNORED_TENSORS = LLAMA_IGNORED
_BETA = "llama_4_scaling_beta"
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _BETA: 0.1,
}
_DEFAULTS = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128}


def _name_rope(config: dict[str, Any]) -> None:
    """Says how positions turn and scale queries in one place, as this family's configs do."""
    rope = {"rope_theta": config.pop("rope_theta"), **(config.pop("rope_scaling") or {"rope_type": "default"})}
    if (beta := config.pop(_BETA, None)) is not None:
        rope[_BETA] = beta
    config["rope_parameters"] = rope


GGUF = GGUFNames("ministral3", interleaved_rope=True, keys={"attention.temperature_scale": _BETA}, adjust=_name_rope)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Ministral3Config`."""
    rope = an_object("rope_parameters", values.get("rope_parameters") or _ROPE)
    rope.pop("max_position_embeddings", None)  # the model's own, once more
    beta = rope.pop(_BETA, None)
    reader = ConfigReader({**_DEFAULTS, **values, "rope_parameters": rope})
    fields = reader.llama_like()
    if beta is not None:
        if "original_max_position_embeddings" not in rope or fields["rope"].kind != "yarn":
            raise ModelError(f"config.json: {_BETA} without YaRN's original_max_position_embeddings")
        number = positive(f"rope_parameters[{_BETA!r}]", beta, 1e6)
        fields["rope"] = replace(fields["rope"], query_beta=number)
    result = ModelConfig("Ministral3ForCausalLM", **fields, windows=reader.sliding_windows(), fused_qkv=fused_qkv)
    reader.finish()
    return result
