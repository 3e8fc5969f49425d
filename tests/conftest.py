"""Shared fixtures, and the strictness every test runs under."""

from __future__ import annotations

import os
from pathlib import Path

# Before jax is imported: one CPU device, no accelerator even where there is one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ["LLM_INFER_CONFIG"] = ""  # defaults of whoever runs the tests are not ours

import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes of every annotated function are checked while tests run, and only then.
DECODING = [f"llm_infer.decoding.{name}" for name in ("sample", "shape", "logprobs")]
DRAWING = [f"pallas_kernels.draw_tokens.{name}" for name in ("xla", "top_tokens")]
install_import_hook(["llm_infer.models", *DECODING, *DRAWING, "llm_infer.engine.step.step"], "beartype.beartype")


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's file: from LLM_INFER_TEST_GGUF, else resolved (and fetched once) like a user's."""
    given = os.environ.get("LLM_INFER_TEST_GGUF")
    if given:
        return Path(given)
    from llm_infer.weights.sources import resolve

    return resolve("smollm2-135m-instruct").path
