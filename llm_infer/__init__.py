"""Large language model inference in JAX: paged attention on CPUs, NVIDIA GPUs and Cloud TPUs from one code base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pallas_kernels.targets import prepare_libtpu

if TYPE_CHECKING:
    from llm_infer.base.errors import CapacityError, ModelError, ProcessLostError, RequestError, UserError
    from llm_infer.base.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
        ScoreOutput,
        StreamChunk,
    )
    from llm_infer.base.rollout import Rollout, TokenScores
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.decoding.structured import StructuredOutputsParams
    from llm_infer.llm import LLM
    from llm_infer.loading import load_model
    from llm_infer.models.load import LoadedModel
    from llm_infer.options import EngineOptions
    from llm_infer.starting import follow

__all__ = [
    "LLM",
    "CapacityError",
    "CompletionOutput",
    "EmbeddingOutput",
    "EngineOptions",
    "LoadedModel",
    "Logprob",
    "ModelError",
    "ProcessLostError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "Rollout",
    "SamplingParams",
    "ScoreOutput",
    "StreamChunk",
    "StructuredOutputsParams",
    "TokenScores",
    "UserError",
    "follow",
    "load_model",
]

_HOMES = {
    "LLM": "llm_infer.llm",
    "EngineOptions": "llm_infer.options",
    "Rollout": "llm_infer.base.rollout",
    "TokenScores": "llm_infer.base.rollout",
    "LoadedModel": "llm_infer.models.load",
    "SamplingParams": "llm_infer.decoding.sampling_params",
    "StructuredOutputsParams": "llm_infer.decoding.structured",
    "follow": "llm_infer.starting",
    "load_model": "llm_infer.loading",
}
"""Where names are whose modules are imported when somebody asks for them; results and errors are asked for there, too."""


prepare_libtpu()


def __getattr__(name: str) -> Any:
    # Imported when asked for: the host layer and `llm-infer --help` do not load JAX.
    if name == "__version__":
        from importlib.metadata import version

        return version("llm-infer")
    if name in __all__:
        import importlib

        home = "errors" if name.endswith("Error") else "outputs"
        return getattr(importlib.import_module(_HOMES.get(name, f"llm_infer.base.{home}")), name)
    raise AttributeError(f"module 'llm_infer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "functional", "__version__", "__all__", "__doc__", "__name__"})
