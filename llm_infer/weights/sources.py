"""Goes from the model name that a user gives to files on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_infer.base.errors import ModelError
from llm_infer.base.files import typed_path
from llm_infer.base.progress import Progress
from llm_infer.weights import default_model
from llm_infer.weights.hub import fetch_from_hub
from llm_infer.weights.model_names import hub_name, why_unknown
from llm_infer.weights.orbax_checkpoint import is_checkpoint, why_no_checkpoint
from llm_infer.weights.safetensors_files import INDEX_NAME


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Files of a model on this machine.

    Attributes:
        name: what the user called it.
        kind: how it is stored.
        path: the GGUF file, or the directory.
    """

    name: str
    kind: Literal["gguf", "huggingface", "orbax"]
    path: Path


def resolve(name: str, *, progress: Progress | None = None) -> ModelSource:
    """Finds a model, and fetches it when it is not on this machine.

    Args:
        name: the default model's name, a GGUF file, a Hugging Face directory (config.json and *.safetensors), or a
            Hugging Face hub id `org/name` or `org/name:Q4_K_M` (see `HubName`). An existing path wins over a hub id.
        progress: reports downloads; None is silent.

    Raises:
        ModelError: there is no such model, or it cannot be fetched.
    """
    progress = progress or Progress.silent()
    if name == default_model.DEFAULT_MODEL.name:
        pinned = default_model.DEFAULT_MODEL
        return ModelSource(name, "gguf", default_model.find(pinned) or default_model.fetch(pinned, progress))
    if (problem := why_unknown(name)) is not None:
        raise ModelError(problem)
    path = typed_path(name)
    if os.path.isdir(path) and is_checkpoint(path):
        return ModelSource(name, "orbax", path)
    if os.path.isdir(path):
        return ModelSource(name, "huggingface", _checked_directory(path))
    if os.path.isfile(path):
        if path.name.endswith((".safetensors", INDEX_NAME, "config.json")):
            raise ModelError(f"{path} is one file of a Hugging Face model: give its directory {path.parent}")
        return ModelSource(name, "gguf", path)
    on_hub = hub_name(name)
    assert on_hub is not None  # or `why_unknown` had known it
    found = fetch_from_hub(on_hub, progress)
    return ModelSource(name, found.kind, found.path if found.kind == "gguf" else _checked_directory(found.path))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ModelError: the file cannot be read or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _checked_directory(directory: Path) -> Path:
    """Returns the directory, if it has a config and safetensors weights."""
    has_weights = (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors"))
    if (directory / "config.json").is_file() and has_weights:
        return directory
    if problem := why_no_checkpoint(directory):
        raise ModelError(problem)
    if not has_weights:
        ggufs = sorted(directory.glob("*.gguf"))
        if ggufs:
            raise ModelError(f"{directory} holds GGUF files: give the path of one of them, e.g. {ggufs[0]}")
        pickles = [p for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(directory.glob(pattern))]
        if pickles:
            raise ModelError(
                f"{directory} has only pickled weights ({pickles[0].name}), which are never loaded because they can "
                "run code: save the model with `save_pretrained(..., safe_serialization=True)`"
            )
        raise ModelError(f"{directory} has no weights: expected *.safetensors with a config.json, or give a GGUF file")
    raise ModelError(f"{directory} has no config.json: expected a Hugging Face model directory")
