"""Grouped matmul through `lax.ragged_dot`, which XLA turns into a grouped kernel on TPU and into masked dots elsewhere.

Known limit: on TPU, XLA first copies the layer's matrices out of the stack (seen in a program compiled for v6e), which doubles
the memory traffic of a step with few tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Case


def why_not(case: Case) -> str | None:
    """Refuses nothing: it runs everywhere."""
    del case
    return None


def grouped_matmul(x: jax.Array, weights: jax.Array, group_sizes: jax.Array, layer: jax.Array) -> jax.Array:
    """Multiplies by `lax.ragged_dot`, see `pallas_kernels.grouped_matmul.grouped_matmul`."""
    matrices = lax.dynamic_index_in_dim(weights, layer, keepdims=False).reshape(group_sizes.shape[0], -1, x.shape[1])
    is_used = (jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes))[:, None]
    dtype = jnp.promote_types(x.dtype, matrices.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    contract_last = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    out = lax.ragged_dot_general(
        jnp.where(is_used, x, 0).astype(dtype),
        matrices.astype(dtype),
        group_sizes,
        contract_last,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(is_used, out, 0.0).astype(x.dtype)
