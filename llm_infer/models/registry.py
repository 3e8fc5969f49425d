"""Which module reads which architecture. A new family is one row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig

if TYPE_CHECKING:
    from llm_infer.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Family:
    """What a row of the registry names; nothing is imported before it is needed.

    Attributes:
        module: reads config keys and names weights; imported without JAX.
        decoder: "module:class" of what computes the model.
    """

    module: str
    decoder: str = "llm_infer.models.decoder:Decoder"


_HERE = "llm_infer.models.families"

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(f"{_HERE}.llama"),
    "OPTForCausalLM": Family(f"{_HERE}.opt", f"{_HERE}.opt_decoder:OPTDecoder"),
    "Qwen2ForCausalLM": Family(f"{_HERE}.qwen2"),
    "Qwen3ForCausalLM": Family(f"{_HERE}.qwen3"),
    "Qwen3MoeForCausalLM": Family(f"{_HERE}.qwen3_moe"),
}


def family(values: Mapping[str, Any]) -> ModuleType:
    """Returns the family module of a Hugging Face config, by its `architectures` entry.

    Raises:
        ModelError: no module knows the architecture.
    """
    names = values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json: architectures={names!r:.60}, expected a list with one name")
    if names[0] not in FAMILIES:
        raise ModelError(f"architecture {names[0]!r:.60} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return import_module(FAMILIES[names[0]].module)


def decoder_class(config: ModelConfig) -> type[Decoder]:
    """Returns the class that computes a model."""
    module, name = FAMILIES[config.architecture].decoder.split(":")
    return getattr(import_module(module), name)
