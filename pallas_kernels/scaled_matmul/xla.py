"""Scaled matmul by XLA, which fuses the widening of the weights into the product as long as the scale comes after it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Case
from pallas_kernels.scaled_matmul.packing import unpack_int4


def why_not(case: Case) -> str | None:
    """Refuses nothing: it runs everywhere."""
    del case
    return None


def scaled_matmul(x: jax.Array, weights: jax.Array, scales: jax.Array, layer: jax.Array) -> jax.Array:
    """Multiplies in one product, or one for each group of a scale, see `pallas_kernels.scaled_matmul.scaled_matmul`."""
    w, s = (lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (weights, scales))
    groups = s.shape[1]
    w = unpack_int4(w, groups) if w.dtype == jnp.uint8 else w
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    s = s.astype(jnp.float32)
    if groups == 1:
        out = product(x, w.astype(x.dtype), (((1,), (1,)), ((), ()))) * s[:, 0][None, :]
    else:
        split_x, split_w = (array.reshape(array.shape[0], groups, -1) for array in (x, w.astype(x.dtype)))
        products = product(split_x, split_w, (((2,), (2,)), ((1,), (1,))))  # [B, M, N]
        out = jnp.sum(products * s.T[:, None, :], axis=0)
    return out.astype(x.dtype)
