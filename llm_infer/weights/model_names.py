"""What a model's name can mean, told from the name and the disk alone: no JAX, no network, no file is opened."""

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
    """Why no model can have this name, for the user; None if it is one, or may be one of the hub."""
    if "\0" in name:  # the operating system's calls refuse it with an error of their own
        return f"model {name!r}: {_EXPECTED}"
    path = Path(name).expanduser()
    # Something that is spelled like a path or a weights file was never meant for the hub.
    on_hub = _HUB_ID.fullmatch(name) is not None and not name.endswith((".gguf", ".safetensors", ".bin", ".pt"))
    if name == DEFAULT_MODEL.name or path.is_file() or path.is_dir() or on_hub:
        return None
    return f"no model {name!r}: there is no such file or directory; {_EXPECTED}"
