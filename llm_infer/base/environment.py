"""What the environment says about this project's files: the cache directory and whether the network may be used."""

from __future__ import annotations

import os
from pathlib import Path

OFFLINE_VARIABLES = ("LLM_INFER_OFFLINE", "HF_HUB_OFFLINE")


def cache_dir() -> Path:
    """Returns the user's cache directory of this project, which need not exist yet.

    It is `LLM_INFER_CACHE`, else `$XDG_CACHE_HOME/llm_infer`, else `~/.cache/llm_infer` (XDG Base Directory Specification).
    """
    chosen = os.environ.get("LLM_INFER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llm_infer"


def offline_variable() -> str | None:
    """Returns the setting that forbids network use as `NAME=value`, or None when the network may be used."""
    for name in OFFLINE_VARIABLES:
        value = os.environ.get(name, "")
        if value.strip().lower() in ("1", "true", "yes", "on"):
            return f"{name}={value}"
    return None
