"""Grouped matmul through `lax.ragged_dot`, which XLA turns into a grouped kernel on TPU and into masked dots elsewhere.

Known limit: on TPU, XLA first copies the layer's matrices out of the stack (seen in a program compiled for v6e), which doubles
the memory traffic of a step with few tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Case, why_not_xla


def why_not(case: Case) -> str | None:
    """Refuses programs whose rows must have the same bits in any company: XLA chooses the order of the additions."""
    return why_not_xla(case)


def grouped_matmul(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, layer: jax.Array, *, dtype: DTypeLike | None = None
) -> jax.Array:
    """Multiplies by `lax.ragged_dot`, see `pallas_kernels.grouped_matmul.grouped_matmul`."""
    matrices = lax.dynamic_index_in_dim(weights, layer, keepdims=False).reshape(group_sizes.shape[0], -1, x.shape[1])
    is_used = (jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes))[:, None]
    wide = jnp.promote_types(x.dtype, matrices.dtype)
    precision = lax.Precision.HIGHEST if wide == jnp.float32 else None
    contract_last = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    out = lax.ragged_dot_general(
        jnp.where(is_used, x, 0).astype(wide),
        matrices.astype(wide),
        group_sizes,
        contract_last,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(is_used, out, 0.0).astype(dtype or x.dtype)
