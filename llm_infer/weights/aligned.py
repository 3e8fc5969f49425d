"""Host arrays that JAX on the CPU takes over without copying them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_ALIGNMENT = 64  # bytes; what XLA's CPU client asks for


def aligned_empty(shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """Returns an uninitialised array that starts at a multiple of 64 bytes, so that `jax.device_put` on the CPU shares it."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
