"""Names of models for shells to complete and for messages to suggest: from the disk alone, in milliseconds."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from llm_infer.base.files import typed_path
from llm_infer.weights.default_model import DEFAULT_MODEL
from llm_infer.weights.gguf_choice import gguf_models, labels


def model_names() -> list[str]:
    """Returns the default model, and those that the hub's cache holds."""
    names = [DEFAULT_MODEL.name]
    for repository in sorted(_hub_cache().glob("models--*--*")):
        name = repository.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in repository.glob("snapshots/*"):
            files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
            names += [f"{name}:{label}" for label in labels(gguf_models(dict.fromkeys(files, 0)))]
            if any(file.endswith(".safetensors") for file in files):
                names.append(name)
    return list(dict.fromkeys(names))


def complete_model(incomplete: str) -> list[str]:
    """Returns names of models that begin so; shells go on with names of files where there are none."""
    return [name for name in model_names() if name.startswith(incomplete)]


def nearest(name: str, names: list[str]) -> str | None:
    """Returns the name that somebody may have meant."""
    spelled = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.6)
    return spelled[found[0]] if found else None


def _hub_cache() -> Path:
    """Returns the hub's cache, as its library finds it; importing that takes a second."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return typed_path(given)
    home = os.environ.get("HF_HOME")
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return typed_path(home or f"{base}/huggingface") / "hub"
