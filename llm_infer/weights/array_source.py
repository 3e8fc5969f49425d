"""Tensors that are in memory already, under Hugging Face names (a `TensorSource`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


class ArraySource:
    """Arrays of JAX or NumPy by name."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = dict(arrays)

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._arrays.keys()

    @property
    def description(self) -> str:
        """What messages call it."""
        return "new weights"

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._arrays[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of its values."""
        return np.dtype(self._arrays[name].dtype)

    def array(self, name: str) -> np.ndarray:
        """Returns a tensor on the host, where it then stays."""
        self._arrays[name] = found = np.asarray(self._arrays[name])
        return found

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Copies all values into `out`, converted to its type."""
        out[...] = np.asarray(self._arrays[name]).astype(out.dtype)

    def same_values(self, name: str, other: str) -> bool:
        """Checks whether two tensors have the same shape and values."""
        return bool(np.array_equal(self._arrays[name], self._arrays[other]))

    def stored_kind(self, name: str) -> str | None:
        """Returns None: all are plain values."""
        return None

    def stored(self, name: str) -> tuple[str, np.ndarray] | None:
        """Returns None: all are plain values."""
        return None

    def close(self) -> None:
        """Lets go of the arrays."""
        self._arrays = {}
