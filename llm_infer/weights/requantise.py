"""Rounds dense matrices into the blocks of GGUF types, as the `gguf` package does."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul.formats import DENSE, FORMATS
from pallas_kernels.quant_matmul.tiles import tile_rows

KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
"""Block types that the `gguf` package can make."""


def why_not_requantised(kind: str) -> str | None:
    """Says why dense weights cannot be rounded into blocks of a kind, or None."""
    return (
        None
        if kind in KINDS or kind in DENSE.values()
        else f"only blocks of {', '.join(KINDS)} can be made from other weights"
    )


def requantised(dense: np.ndarray, kind: str, *, tiled: bool) -> np.ndarray:
    """Returns the rows [..., N, R] in blocks of matrices [..., N, K].

    Args:
        dense: floats; K is a multiple of 32.
        kind: one of KINDS, or a plain type's.
        tiled: give the rows the tiled order.
    """
    if kind in DENSE.values():
        return dense.astype(jnp.dtype(FORMATS[kind].dtype))
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = quantize(np.ascontiguousarray(dense, np.float32), GGMLQuantizationType[kind.upper()])
    if tiled:
        rows = np.array(rows)
        tile_rows(rows, kind)
    return rows
