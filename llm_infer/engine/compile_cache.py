"""JAX's persistent compilation cache, on by default: a program is compiled once per machine, not once per process."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from llm_infer.base.environment import cache_dir


def cache_directory() -> Path | None:
    """Returns `JAX_COMPILATION_CACHE_DIR`, else a folder in the user's cache; None where `LLM_INFER_COMPILE_CACHE=0`."""
    if os.environ.get("LLM_INFER_COMPILE_CACHE") == "0":
        return None
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given:
        return Path(given)
    return cache_dir() / "xla"


def enable_compile_cache() -> str | None:
    """Points JAX at the cache and keeps every program, however small.

    Returns:
        A note for the user where programs cannot be kept; the engine runs all the same.
    """
    directory = cache_directory()
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"compiled programs are not kept: {directory} cannot be made ({error.strerror}); set LLM_INFER_CACHE"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None
