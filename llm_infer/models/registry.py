"""Which module reads which architecture. A new family is one row here."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llm_infer.errors import ModelError
from llm_infer.models import llama, opt, qwen2, qwen3, qwen3_moe
from llm_infer.models.config import ModelConfig

if TYPE_CHECKING:
    from llm_infer.models.decoder import Decoder

FAMILIES: dict[str, ModuleType] = {
    "LlamaForCausalLM": llama,
    "OPTForCausalLM": opt,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
}


def family(values: Mapping[str, Any]) -> ModuleType:
    """The family module of a Hugging Face config, by its `architectures` entry.

    Raises:
        ModelError: no module knows the architecture.
    """
    names = values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json: architectures={names!r:.60}, expected a list with one name")
    if names[0] not in FAMILIES:
        raise ModelError(f"architecture {names[0]!r:.60} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[names[0]]


def decoder_class(config: ModelConfig) -> type[Decoder]:
    """The module that computes a model: the shared decoder, unless the family brings its own."""
    own = getattr(FAMILIES[config.architecture], "decoder_class", None)
    if own is not None:
        return own()
    from llm_infer.models.decoder import Decoder  # here, so that configurations can be read without JAX

    return Decoder
