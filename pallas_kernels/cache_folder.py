"""The user's folder for files that are kept from run to run: compiled kernels, measured crossovers and what others add."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LLM_INFER_CACHE"


def cache_folder() -> Path:
    """Returns the folder, which need not exist yet.

    `LLM_INFER_CACHE`, else `$XDG_CACHE_HOME/llm_infer`, else `~/.cache/llm_infer` (XDG Base Directory Specification).
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llm_infer"
