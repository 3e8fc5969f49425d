"""Matmul with weight-only quantisation for accelerators: int8, float8 or packed int4 weights and scales. Contract and entry.

Axis letters: M activation rows, K their width, N output features, L layers, B groups of K with a scale each (1: the scale is
per output feature), H = K / B.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of, expect, layer_index
from pallas_kernels.scaled_matmul.packing import pack_int4, quantise, unpack_int4

__all__ = ["WEIGHT_DTYPES", "pack_int4", "quantise", "scaled_matmul", "unpack_int4"]

WEIGHT_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2", "uint8")
"""uint8 holds two int4 numbers, see `packing.pack_int4`."""


def scaled_matmul(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array,
    layer: jax.Array | int = 0,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies x with the transposed weights of one layer, each times its group's scale. Sums are float32.

    Args:
        x: Float[Array, "M K"].
        weights: [L, N, K] of int8 or float8, or UInt8[Array, "L N K/2"] of packed int4.
        scales: Float[Array, "L N B"]; the weights k of group b are b·H … (b + 1)·H - 1.
        layer: Int32 scalar, may be traced.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        Float[Array, "M N"] in x's dtype.

    Raises:
        ValueError: at trace time, for shapes or dtypes other than these.
    """
    expect(x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating), "x", "floats of shape [M, K]", x)
    expect(weights.dtype.name in WEIGHT_DTYPES, "weights", f"a dtype of {', '.join(WEIGHT_DTYPES)}", weights)
    width = x.shape[1] // (2 if weights.dtype == jnp.uint8 else 1)
    expect(weights.ndim == 3 and weights.shape[2] == width, "weights", f"[L, N, {width}] for K={x.shape[1]}", weights)
    fits = scales.ndim == 3 and scales.shape[:2] == weights.shape[:2] and jnp.issubdtype(scales.dtype, jnp.floating)
    expect(fits, "scales", f"floats of shape [L={weights.shape[0]}, N={weights.shape[1]}, B]", scales)
    even = x.shape[1] % (scales.shape[2] * (2 if weights.dtype == jnp.uint8 else 1)) == 0
    expect(even, "scales", f"a number of groups that divides K={x.shape[1]} (into even groups for int4)", scales)
    index = layer_index(layer, weights.shape[0])
    case = case_of({"x": x, "weights": weights, "scales": scales})
    return dispatch.pick("scaled_matmul", case, implementation)(x, weights, scales, index)
