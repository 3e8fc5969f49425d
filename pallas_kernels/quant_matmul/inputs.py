"""What may happen to activations on their way into a product: an RMSNorm, or a gate. Kernels that round them do it there."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_sums import mean_squares


class Norm(NamedTuple):
    """An RMSNorm (Zhang and Sennrich, 2019) of all layers.

    Attributes:
        weight: Float[Array, "L K"] float32.
        layer: which of them; Int32 scalar, may be traced.
        eps: added to the mean of squares.
    """

    weight: jax.Array
    layer: jax.Array | int
    eps: jax.Array | float


def prepared(x: jax.Array, gate: jax.Array | None = None, norm: Norm | None = None) -> jax.Array:
    """Returns x after the norm, or silu(gate) · x, or x."""
    if norm is not None:
        scale = lax.rsqrt(mean_squares(x.astype(jnp.float32)) + norm.eps)
        return x * scale * lax.dynamic_index_in_dim(norm.weight, norm.layer, keepdims=True)
    return x if gate is None else jax.nn.silu(gate) * x
