"""Sums over the features of each row, to the same bits however many rows there are: contract and entry point.

XLA adds in another order where an array is small, so a token's norm would depend on its company.

Axis letters: R rows, E features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of, expect

__all__ = ["KINDS", "logsumexp", "mean_squares", "row_sums", "softmax"]

KINDS = ("values", "squares", "exps", "above")


def row_sums(
    x: jax.Array, shift: jax.Array | None = None, *, kind: str = "values", implementation: str | None = None
) -> jax.Array:
    """Returns the sum of f(x - shift) over the last axis.

    With the native CPU implementation the order of the additions depends on E alone, and a row's sum has the same bits in
    any array and on any number of threads. Others add as XLA does.

    Args:
        x: Float[Array, "... E"] float32.
        shift: Float[Array, "..."] float32; None for 0.
        kind: f: "values" is the number itself, "squares" its square, "exps" e to its power (finite numbers or -inf),
            "above" 1 if it is more than 0 and else 0.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        Float[Array, "..."] float32.

    Raises:
        ValueError: at trace time, for shapes, dtypes or kinds other than these.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    expect(x.ndim >= 1 and x.dtype == jnp.float32, "x", "float32 [..., E]", x)
    shift = jnp.zeros(x.shape[:-1], jnp.float32) if shift is None else shift
    legal = shift.shape == x.shape[:-1] and shift.dtype == jnp.float32
    expect(legal, "shift", f"float32 {list(x.shape[:-1])}", shift)
    rows = x.reshape(-1, x.shape[-1])
    run = dispatch.pick("row_sums", case_of({"x": rows}, kind=kind), implementation)
    return run(rows, shift.reshape(-1), kind).reshape(shift.shape)


def mean_squares(x: jax.Array, shift: jax.Array | None = None) -> jax.Array:
    """Returns the mean of (x - shift)² over the last axis, which stays with length 1; arguments as of `row_sums`."""
    return row_sums(x, shift, kind="squares")[..., None] / x.shape[-1]


def logsumexp(x: jax.Array) -> jax.Array:
    """Returns log(sum(exp(x))) over the last axis, float32; x: Float[Array, "... E"]."""
    x = x.astype(jnp.float32)
    most = jax.lax.stop_gradient(jnp.max(x, axis=-1))
    most = jnp.where(jnp.isfinite(most), most, 0.0)
    return most + jnp.log(row_sums(x, most, kind="exps"))


def softmax(x: jax.Array) -> jax.Array:
    """Returns exp(x) / sum(exp(x)) over the last axis, float32."""
    x = x.astype(jnp.float32)
    exps = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True)))
    return exps / row_sums(exps)[..., None]
