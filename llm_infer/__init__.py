"""Large language model inference in JAX: paged attention on CPUs, NVIDIA GPUs and Cloud TPUs from one code base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pallas_kernels.targets import prepare_libtpu

if TYPE_CHECKING:
    from llm_infer.base.outputs import RequestOutput
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.decoding.structured import StructuredOutputsParams
    from llm_infer.llm import LLM
    from llm_infer.options import EngineOptions
    from llm_infer.starting import follow

__all__ = ["LLM", "EngineOptions", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "follow"]

_HOME = {
    "LLM": "llm_infer.llm",
    "SamplingParams": "llm_infer.decoding.sampling_params",
    "StructuredOutputsParams": "llm_infer.decoding.structured",
    "RequestOutput": "llm_infer.base.outputs",
    "EngineOptions": "llm_infer.options",
    "follow": "llm_infer.starting",
}


prepare_libtpu()


def __getattr__(name: str) -> Any:
    # Imported when asked for: the host layer and `llm-infer --help` do not load JAX.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'llm_infer' has no attribute {name!r}")
