"""What the environment says about this project's files: the cache directory and whether the network may be used."""

from __future__ import annotations

import os
from pathlib import Path

from pallas_kernels.cache_folder import cache_folder

OFFLINE_VARIABLES = ("LLM_INFER_OFFLINE", "HF_HUB_OFFLINE")


def cache_dir() -> Path:
    """Returns the user's cache directory of this project, which need not exist yet; see `pallas_kernels.cache_folder`."""
    return cache_folder()


def offline_variable() -> str | None:
    """Returns the setting that forbids network use as `NAME=value`, or None when the network may be used."""
    for name in OFFLINE_VARIABLES:
        value = os.environ.get(name, "")
        if value.strip().lower() in ("1", "true", "yes", "on"):
            return f"{name}={value}"
    return None
