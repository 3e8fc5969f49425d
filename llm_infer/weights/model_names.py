"""Tells from a model's name and the disk alone what it can mean, without JAX or network, and without opening a file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm_infer.base.files import is_there
from llm_infer.weights.default_model import DEFAULT_MODEL

_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?(?::(?P<quantisation>[\w./-]+))?")
_EXPECTED = (
    f"expected {DEFAULT_MODEL.name!r}, a GGUF file, a Hugging Face directory, a directory written by `llm-infer convert`, "
    "or a hub id org/name or org/name:Q4_K_M"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A model of the Hugging Face hub, written `org/name`, `org/name:Q4_K_M` or `org/name@revision:Q4_K_M`.

    Attributes:
        repo_id: owner and name of the repository.
        revision: branch, tag or commit; None is the main branch.
        quantisation: which of its GGUF files: their type, or the file's name without the ending; None leaves it to the hub's
            files.
    """

    repo_id: str
    revision: str | None = None
    quantisation: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo_id}{revision}" + ("" if self.quantisation is None else f":{self.quantisation}")


def hub_name(name: str) -> HubName | None:
    """Returns what a name says of a model on the hub, or None if it is not spelled like one."""
    found = _HUB_NAME.fullmatch(name)
    # Something that is spelled like a path or a weights file was never meant for the hub.
    if found is None or ".." in name or found["repo"].endswith((".gguf", ".safetensors", ".bin", ".pt")):
        return None
    return HubName(found["repo"], found["revision"], found["quantisation"])


def why_unknown(name: str) -> str | None:
    """Says why no model can have this name, for the user; None if it is one, or may be one of the hub."""
    if "\0" in name:  # the operating system's calls refuse it with an error of their own
        return f"model {name!r}: {_EXPECTED}"
    if name == DEFAULT_MODEL.name or is_there(name) or hub_name(name) is not None:
        return None
    return f"no model {name!r}: there is no such file or directory; {_EXPECTED}"
