"""Tells from a model's name and the disk alone what it can mean, without JAX or network, and without opening a file."""

from __future__ import annotations

import re
from pathlib import Path

from llm_infer.weights.default_model import DEFAULT_MODEL

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPECTED = (
    f"expected {DEFAULT_MODEL.name!r}, a GGUF file, a Hugging Face directory, a directory written by `llm-infer convert`, "
    "or a hub id org/name"
)


def why_unknown(name: str) -> str | None:
    """Says, for the user, why no model can have this name; None if one has it, or one of the hub may."""
    if "\0" in name:  # the operating system would refuse it with an error of its own
        return f"model {name!r}: {_EXPECTED}"
    path = Path(name).expanduser()
    # A name that looks like a path or a weights file was never meant for the hub.
    on_hub = _HUB_ID.fullmatch(name) is not None and not name.endswith((".gguf", ".safetensors", ".bin", ".pt"))
    if name == DEFAULT_MODEL.name or path.is_file() or path.is_dir() or on_hub:
        return None
    return f"no model {name!r}: there is no such file or directory; {_EXPECTED}"
