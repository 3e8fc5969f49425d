"""Scaled matmul the obvious way, the oracle of the others: it dequantises, then takes a float32 product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Case
from pallas_kernels.scaled_matmul.packing import unpack_int4


def why_not(case: Case) -> str | None:
    """Refuses nothing: it runs everywhere, but writes the dequantised weights to memory, so it is for tests."""
    del case
    return None


def scaled_matmul(x: jax.Array, weights: jax.Array, scales: jax.Array, layer: jax.Array) -> jax.Array:
    """Dequantises and multiplies, see `pallas_kernels.scaled_matmul.scaled_matmul`."""
    w, s = (lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (weights, scales))
    w = unpack_int4(w, s.shape[1]) if w.dtype == jnp.uint8 else w
    full = w.astype(jnp.float32) * jnp.repeat(s.astype(jnp.float32), w.shape[1] // s.shape[1], axis=1)
    return jnp.einsum("mk,nk->mn", x.astype(jnp.float32), full, precision="highest").astype(x.dtype)
