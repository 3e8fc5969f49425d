"""Which module reads which architecture. A new family is one row here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig

if TYPE_CHECKING:
    from llm_infer.models.decoder import Decoder
    from llm_infer.weights.gguf_names import GGUFNames


@dataclass(frozen=True, slots=True)
class Family:
    """What a row of the registry names; nothing is imported before it is needed.

    Attributes:
        module: reads config keys and names weights; imported without JAX.
        decoder: "module:class" of what computes the model.
        gguf: llama.cpp's names for it; the module's `GGUF` says how its files differ. Where two families have the same name,
            "name+experts" stands for the one with experts.
        text_of: Hugging Face's classes of models that hold this one beside towers for pictures or sound.
    """

    module: str
    decoder: str = "llm_infer.models.decoder:Decoder"
    gguf: tuple[str, ...] = ()
    text_of: tuple[str, ...] = ()


_HERE = "llm_infer.models.families"

FAMILIES: dict[str, Family] = {
    "Gemma2ForCausalLM": Family(f"{_HERE}.gemma2", gguf=("gemma2",)),
    "Gemma3ForCausalLM": Family(f"{_HERE}.gemma3", gguf=("gemma3",), text_of=("Gemma3ForConditionalGeneration",)),
    "Glm4ForCausalLM": Family(f"{_HERE}.glm4", gguf=("glm4",)),
    "Glm4MoeForCausalLM": Family(f"{_HERE}.glm4_moe", gguf=("glm4moe",)),
    "GptOssForCausalLM": Family(f"{_HERE}.gpt_oss", gguf=("gpt-oss",)),
    "GraniteForCausalLM": Family(f"{_HERE}.granite", gguf=("granite",)),
    "Lfm2ForCausalLM": Family(f"{_HERE}.lfm2", gguf=("lfm2",)),
    "Lfm2MoeForCausalLM": Family(f"{_HERE}.lfm2_moe", gguf=("lfm2moe",)),
    "LlamaForCausalLM": Family(f"{_HERE}.llama", gguf=("llama",)),
    "MiniMaxM2ForCausalLM": Family(f"{_HERE}.minimax_m2", gguf=("minimax-m2",)),
    "MistralForCausalLM": Family(f"{_HERE}.mistral", text_of=("Mistral3ForConditionalGeneration",)),
    "Ministral3ForCausalLM": Family(
        f"{_HERE}.ministral3", gguf=("mistral3",), text_of=("Mistral3ForConditionalGeneration",)
    ),
    "MixtralForCausalLM": Family(f"{_HERE}.mixtral", gguf=("llama+experts",)),
    "Olmo2ForCausalLM": Family(f"{_HERE}.olmo2", gguf=("olmo2",)),
    "Olmo3ForCausalLM": Family(f"{_HERE}.olmo3"),
    "OPTForCausalLM": Family(f"{_HERE}.opt", f"{_HERE}.opt_decoder:OPTDecoder"),
    "Phi3ForCausalLM": Family(f"{_HERE}.phi3", gguf=("phi3",)),
    "Qwen2ForCausalLM": Family(f"{_HERE}.qwen2", gguf=("qwen2",)),
    "Qwen2MoeForCausalLM": Family(f"{_HERE}.qwen2_moe", gguf=("qwen2moe",)),
    "Qwen3ForCausalLM": Family(f"{_HERE}.qwen3", gguf=("qwen3",)),
    "Qwen3MoeForCausalLM": Family(f"{_HERE}.qwen3_moe", gguf=("qwen3moe",)),
    "SmolLM3ForCausalLM": Family(f"{_HERE}.smollm3", gguf=("smollm3",)),
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
        nearest = difflib.get_close_matches(names[0], FAMILIES, n=1, cutoff=0.0)[0]
        raise ModelError(
            f"architecture {names[0]!r:.60} is not supported; the nearest is {nearest}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return import_module(FAMILIES[names[0]].module)


def gguf_family(name: str, experts: bool, where: str) -> tuple[str, GGUFNames]:
    """Returns Hugging Face's class for a GGUF architecture, and the names in its files.

    Args:
        name: llama.cpp's name of the architecture.
        experts: whether the file says that it has experts.
        where: the file.

    Raises:
        ModelError: no family has it.
    """
    for each in ([f"{name}+experts"] if experts else []) + [name]:
        for hf_class, row in FAMILIES.items():
            if each in row.gguf:
                return hf_class, import_module(row.module).GGUF
    supported = ", ".join(sorted({each.partition("+")[0] for row in FAMILIES.values() for each in row.gguf}))
    raise ModelError(f"{where}: architecture {name!r:.60} is not supported from GGUF; supported: {supported}")


def decoder_class(config: ModelConfig) -> type[Decoder]:
    """Returns the class that computes a model."""
    module, name = FAMILIES[config.architecture].decoder.split(":")
    return getattr(import_module(module), name)
