"""Grouped matmul for mixtures of experts: rows sorted by expert, each multiplied with its expert's matrix. Contract and entry.

Axis letters: M rows, K their width, N output features, X experts (groups), L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

__all__ = ["grouped_matmul"]


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    layer: jax.Array | int = 0,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """out[i] = x[i] times the transposed matrix of row i's expert, for rows that are sorted by expert.

    Sums are float32 whatever the dtypes.

    Args:
        x: Float[Array, "M K"]. The first group_sizes[0] rows belong to expert 0, the next group_sizes[1] to expert 1, and so
            on. Rows past their sum belong to nobody and may hold anything.
        weights: Float[Array, "L X*N K"], float32 or bfloat16: the experts' matrices [N, K] below each other, all layers.
        group_sizes: Int32[Array, "X"], dynamic, each at least 0, M at most in all.
        layer: Int32 scalar, may be traced: which layer of the weights.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        Float[Array, "M N"] in x's dtype; rows of nobody are 0.

    Raises:
        ValueError: at trace time, for shapes or dtypes other than these.
    """
    _expect(x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating), "x", "floats of shape [M, K]", x)
    _expect(group_sizes.ndim == 1 and group_sizes.dtype == jnp.int32, "group_sizes", "int32 of shape [X]", group_sizes)
    num_experts, width = group_sizes.shape[0], x.shape[1]
    fits = weights.ndim == 3 and weights.shape[2] == width and weights.shape[1] % num_experts == 0
    _expect(fits, "weights", f"[L, X*N, K] with X={num_experts} and K={width}", weights)
    _expect(weights.dtype in (jnp.float32, jnp.bfloat16), "weights", "float32 or bfloat16", weights)
    platform, device_kind = dispatch.target()
    arrays = {"x": x, "weights": weights, "group_sizes": group_sizes}
    case = dispatch.Case(
        platform=platform,
        device_kind=device_kind,
        shapes={name: tuple(array.shape) for name, array in arrays.items()},
        dtypes={name: array.dtype.name for name, array in arrays.items()},
    )
    return dispatch.pick("grouped_matmul", case, implementation)(x, weights, group_sizes, jnp.asarray(layer, jnp.int32))


def _expect(holds: bool, name: str, expected: str, found: jax.Array) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {found.dtype.name} of shape {list(found.shape)}")
