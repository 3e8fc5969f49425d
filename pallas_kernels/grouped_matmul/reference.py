"""Grouped matmul the obvious way, the oracle of the others: it multiplies every row with every expert and takes one result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Case, why_not_xla


def why_not(case: Case) -> str | None:
    """Refuses what XLA does: it runs everywhere else, but multiplies X times too much, so it is for tests."""
    return why_not_xla(case)


def grouped_matmul(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, layer: jax.Array, *, dtype: DTypeLike | None = None
) -> jax.Array:
    """Multiplies every row with every expert, see `pallas_kernels.grouped_matmul.grouped_matmul`."""
    num_experts = group_sizes.shape[0]
    matrices = lax.dynamic_index_in_dim(weights, layer, keepdims=False).reshape(num_experts, -1, x.shape[1])
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    is_used = row < jnp.sum(group_sizes)
    expert = jnp.minimum(jnp.searchsorted(jnp.cumsum(group_sizes), row, side="right"), num_experts - 1)
    rows = jnp.where(is_used[:, None], x, 0).astype(jnp.float32)  # nobody's rows may hold NaN
    every = jnp.einsum("mk,xnk->mxn", rows, matrices.astype(jnp.float32), precision="highest")
    taken = jnp.take_along_axis(every, expert[:, None, None], axis=1)[:, 0]
    return jnp.where(is_used[:, None], taken, 0.0).astype(dtype or x.dtype)
