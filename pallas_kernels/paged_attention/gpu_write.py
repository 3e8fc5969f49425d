"""Writes a step's K and V into the pages on a GPU (Triton), in place and in the pages' dtype."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.gpu_blocks import power_of_two
from pallas_kernels.paged_attention.plan import AttentionPlan

ROWS = 16
"""Token rows of a thread block."""


def round_half_even(x: jax.Array) -> jax.Array:
    """Returns the nearest whole number, ties to even, exact below 2^23; Triton has only floor."""
    below = jnp.floor(x)
    odd = below - 2.0 * jnp.floor(below * 0.5)
    rest = x - below
    return jnp.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), below + 1.0, below)


def to_page_dtype(x: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
    """Computes `pages.to_page_dtype` with the operations that Triton has."""
    x = x.astype(jnp.float32)
    if scale is not None:
        x = x / scale
    if np.dtype(dtype) == np.int8:
        x = jnp.minimum(jnp.maximum(x, -127.0), 127.0)
        return round_half_even(x).astype(jnp.int32).astype(jnp.int8)
    if np.dtype(dtype).itemsize == 1:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.minimum(jnp.maximum(x, -limit), limit)
    return x.astype(dtype)


def write_rows(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    layer: jax.Array | int,
    k_scale: jax.Array | float | None,
    v_scale: jax.Array | float | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the pages with the step's K and V in them, and an array for the output whose padding rows are 0.

    The arguments are those of `paged_attention`; q gives the output its shape and dtype.
    """
    tokens, num_kv_heads, head_dim = k_new.shape
    scaled = k_scale is not None or v_scale is not None
    scales = (
        [jnp.asarray(1.0 if s is None else s, jnp.float32).reshape(1) for s in (k_scale, v_scale)] if scaled else []
    )
    inputs = (jnp.asarray(layer, jnp.int32).reshape(1), plan.write_slot, plan.q_start, *scales, k_new, v_new, pages)
    kernel = functools.partial(_kernel, q.shape[1] // num_kv_heads, scaled)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(tokens, ROWS), num_kv_heads),
        out_shape=(jax.ShapeDtypeStruct(pages.shape, pages.dtype), jax.ShapeDtypeStruct(q.shape, q.dtype)),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"write_kv_{pages.dtype.name}_{head_dim}",
    )(*inputs)


def _kernel(group: int, scaled: bool, layer_ref, slot_ref, q_start_ref, *refs) -> None:
    """Writes one block of rows of one KV head; `group` query heads of the output belong to it."""
    scale_refs, (k_ref, v_ref, _, pages_ref, out_ref) = refs[:-5], refs[-5:]
    tokens, _, head_dim = k_ref.shape
    page_size = pages_ref.shape[4]
    head, layer = pl.program_id(1), layer_ref[0]
    row = pl.program_id(0) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    column = jnp.arange(power_of_two(head_dim), dtype=jnp.int32)[None, :]
    in_head = column < head_dim
    num_rows = q_start_ref[q_start_ref.shape[0] - 1]

    slot = plgpu.load(slot_ref.at[row], mask=row < tokens, other=0)
    page = lax.div(slot, jnp.int32(page_size))[:, None]
    offset = lax.rem(slot, jnp.int32(page_size))[:, None]
    used = (row < num_rows)[:, None] & in_head
    for which, ref in enumerate((k_ref, v_ref)):
        x = plgpu.load(ref.at[row[:, None], head, column], mask=used, other=0.0)
        x = to_page_dtype(x, scale_refs[which][0] if scaled else None, pages_ref.dtype)
        plgpu.store(pages_ref.at[layer, page, which, head, offset, column], x, mask=used)

    zero = jnp.zeros((ROWS, column.shape[1]), out_ref.dtype)
    padding = ((row >= num_rows) & (row < tokens))[:, None] & in_head
    for member in range(group):
        plgpu.store(out_ref.at[row[:, None], head * group + member, column], zero, mask=padding)
