"""The interface that every file format of weights offers to the loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors in files, under Hugging Face names. Nothing is read before it is asked for.

    Shapes are row-major as in numpy: a matrix is [out, in].
    """

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        ...

    @property
    def description(self) -> str:
        """The file or directory, for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of the values as read; block-quantised tensors are float32."""
        ...

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads all values into `out`, which has the tensor's shape, and converts them to its type.

        Temporaries stay below a few MB whatever the size of the tensor.

        Raises:
            ModelError: the values cannot be read.
        """
        ...

    def stored_kind(self, name: str) -> str | None:
        """Returns the kind of what `stored` returns, and reads nothing."""
        ...

    def stored(self, name: str) -> tuple[str, np.ndarray] | None:
        """Returns a matrix as the file stores it: its kind (see `pallas_kernels.quant_matmul`) and its rows [N, R] in blocks.

        It is None where the file holds plain values, or blocks that no kernel multiplies with: then read the values.
        """
        ...

    def close(self) -> None:
        """Lets go of the files. Mapped memory goes away with the last view of it."""
        ...
