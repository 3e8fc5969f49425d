"""The text model of a repository that holds more: its config, its tensors, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llm_infer.models.registry import FAMILIES
from llm_infer.weights.safetensors_files import SafetensorsSource

_PREFIXES = {
    r"language_model\.model\.": "model.",
    r"language_model\.lm_head\.": "lm_head.",
    r"model\.language_model\.": "model.",
    r"lm_head\.": "lm_head.",
}
"""Beginnings of the text model's tensors, as several versions of transformers write them → those of a model of text alone."""


class TextTensors:
    """The tensors of the text model under the names that they have where it stands alone (a `TensorSource`)."""

    def __init__(self, source: SafetensorsSource) -> None:
        self._source = source
        self._names: dict[str, str] = {}
        for name in source.names:
            for prefix, plain in _PREFIXES.items():
                if found := re.match(prefix, name):
                    self._names.setdefault(plain + name[found.end() :], name)
                    break

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors of the text model."""
        return self._names.keys()

    @property
    def description(self) -> str:
        """The directory, or the files."""
        return self._source.description

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of a tensor as stored."""
        return self._source.dtype(self._names[name])

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads all values into `out`, which has the tensor's shape, and converts them to its type."""
        self._source.read_into(self._names[name], out)

    def same_values(self, name: str, other: str) -> bool:
        """Checks whether two tensors have the same shape and values."""
        return self._source.same_values(self._names[name], self._names[other])

    def stored_kind(self, name: str) -> None:
        """Returns None: safetensors files hold plain values only."""
        return self._source.stored_kind(self._names[name])

    def stored(self, name: str) -> None:
        """Returns None, as `stored_kind` does."""
        return self._source.stored(self._names[name])

    def close(self) -> None:
        """Lets go of the files."""
        self._source.close()


def text_class(config: Mapping[str, Any]) -> str | None:
    """Returns Hugging Face's class of the text model that a config holds beside others; None where there are no others."""
    names = config.get("architectures")
    if not isinstance(names, list) or not isinstance(config.get("text_config"), dict):
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    found = [hf_class for hf_class, row in FAMILIES.items() if set(names) & set(row.text_of)]
    # A class may hold the one or the other: modules are named as Hugging Face names a type of model.
    kind = config["text_config"].get("model_type")
    named = [hf_class for hf_class in found if FAMILIES[hf_class].module.rpartition(".")[2] == kind]
    return next(iter(named or found), None)


def text_config(config: Mapping[str, Any], hf_class: str) -> dict[str, Any]:
    """Returns the text model's config as if it stood alone; whether the head is the embedding, the outer one decides."""
    tied = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
    return dict(config["text_config"]) | tied | {"architectures": [hf_class]}
