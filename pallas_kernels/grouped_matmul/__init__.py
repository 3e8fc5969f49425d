"""Grouped matmul for mixtures of experts: rows sorted by expert, each multiplied with its expert's matrix. Contract and entry.

Axis letters: M rows, K their width, N output features, X experts (groups), L layers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of, expect, layer_index
from pallas_kernels.grouped_matmul.gradients import differentiable

__all__ = ["grouped_matmul"]


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    layer: jax.Array | int = 0,
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies each x[i] with the transposed matrix of row i's expert, for rows that are sorted by expert.

    Sums are float32 whatever the dtypes. It may be differentiated (in reverse) by x and the weights, and batched.

    Args:
        x: Float[Array, "M K"]. The first group_sizes[0] rows belong to expert 0, the next group_sizes[1] to expert 1, and so
            on. Rows past their sum belong to nobody and may hold anything.
        weights: Float[Array, "L X*N K"], float32 or bfloat16: the experts' matrices [N, K] below each other, all layers.
        group_sizes: Int32[Array, " X"], dynamic, each at least 0, together at most M.
        layer: Int32 scalar, may be traced; selects the layer of the weights.
        dtype: of the result; None is that of x.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        Float[Array, "M N"] in that dtype; rows of nobody are 0.

    Raises:
        ValueError: at trace time, for shapes or dtypes other than these.
    """
    expect(x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating), "x", "floats of shape [M, K]", x)
    expect(group_sizes.ndim == 1 and group_sizes.dtype == jnp.int32, "group_sizes", "int32 of shape [X]", group_sizes)
    num_experts, width = group_sizes.shape[0], x.shape[1]
    fits = weights.ndim == 3 and weights.shape[2] == width and weights.shape[1] % num_experts == 0
    expect(fits, "weights", f"[L, X*N, K] with X={num_experts} and K={width}", weights)
    expect(weights.dtype in (jnp.float32, jnp.bfloat16), "weights", "float32 or bfloat16", weights)
    index = layer_index(layer, weights.shape[0])
    case = case_of({"x": x, "weights": weights, "group_sizes": group_sizes})
    run = dispatch.pick("grouped_matmul", case, implementation)
    run = run if dtype is None else functools.partial(run, dtype=dtype)
    return differentiable(run, x, weights, group_sizes, index)
