"""Quantised matmul by XLA: dequantise the layer's matrix into scratch memory, then XLA's own dot. Good for many rows."""

from __future__ import annotations

import jax
from jax import Array, lax

from pallas_kernels.dispatch import Case
from pallas_kernels.quant_matmul.reference import dequantise, gated
from pallas_kernels.quant_matmul.tiles import untile


def why_not(case: Case) -> str | None:
    """Runs everywhere."""
    del case
    return None


def quant_matmul(
    x: Array,
    blocks: Array,
    layer: Array,
    gate: Array | None = None,
    *,
    kind: str,
    precision: str = "exact",
    tiled: bool = False,
) -> Array:
    """See `pallas_kernels.quant_matmul.quant_matmul`; always exact."""
    del precision
    rows = lax.dynamic_index_in_dim(blocks, layer, 0, keepdims=False)
    weights = dequantise(untile(rows, kind) if tiled else rows, kind)
    return lax.dot_general(gated(x, gate), weights, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
