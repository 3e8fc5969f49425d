"""Merges the results of several units for one row by log-sum-exp (Triton)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.gpu_blocks import power_of_two

LOG2_E = math.log2(math.e)
HEADS = 4
"""Query heads of a thread block."""


def merge_splits(
    out: jax.Array,
    partial: jax.Array,
    lse: jax.Array,
    merge: jax.Array,
    max_splits: int,
    sinks: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Returns `out` [T, Hq, D] with those rows set that have partial results.

    Args:
        out: updated in place; other rows stay.
        partial: Float32[Array, "R·max_splits Hkv G' D"], normalised results of the units; heads of a group from 0 on; G' may
            be more than there are.
        lse: Float32[Array, "R·max_splits Hkv G'"], base-2 logarithm of the sums of their exponentials.
        merge: Int32[Array, "R 2"], see `gpu_units.Units`.
        max_splits: rows of `partial` per slot.
        sinks: Float[Array, " Hq"], one more score per head without a value.
    """
    num_heads = out.shape[1]
    inputs = (merge, partial, lse, *(() if sinks is None else (sinks.astype(jnp.float32),)), out)
    return pl.pallas_call(
        functools.partial(_kernel, max_splits),
        grid=(merge.shape[0], pl.cdiv(num_heads, HEADS)),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"merge_splits_{max_splits}",
    )(*inputs)


def _kernel(max_splits: int, merge_ref, partial_ref, lse_ref, *refs) -> None:
    sinks_ref, out_ref = refs[0] if len(refs) == 3 else None, refs[-1]
    _, num_heads, head_dim = out_ref.shape
    group = num_heads // partial_ref.shape[1]
    slot = pl.program_id(0)
    row, splits = merge_ref[slot, 0], merge_ref[slot, 1]
    head = pl.program_id(1) * HEADS + jnp.arange(HEADS, dtype=jnp.int32)
    kv_head, member = lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group))
    column = jnp.arange(power_of_two(head_dim), dtype=jnp.int32)[None, :]

    @pl.when(splits > 0)
    def _merge() -> None:
        split = jnp.arange(power_of_two(max_splits), dtype=jnp.int32)[:, None]
        exists = head < num_heads
        there = (split < splits) & exists[None, :]
        first = slot * max_splits
        each = plgpu.load(lse_ref.at[first + split, kv_head[None], member[None]], mask=there, other=-jnp.inf)
        highest = jnp.maximum(jnp.max(each, axis=0), -1e30)
        sink = None
        if sinks_ref is not None:
            sink = plgpu.load(sinks_ref.at[head], mask=exists, other=0.0) * LOG2_E
            highest = jnp.maximum(highest, sink)
        total = jnp.sum(jnp.exp2(each - highest[None, :]), axis=0)
        if sink is not None:
            total += jnp.exp2(sink - highest)
        used = exists[:, None] & (column < head_dim)

        def add(index: jax.Array, acc: jax.Array) -> jax.Array:
            at = first + index
            one = plgpu.load(lse_ref.at[at, kv_head, member], mask=exists, other=-jnp.inf)
            value = plgpu.load(partial_ref.at[at, kv_head[:, None], member[:, None], column], mask=used, other=0.0)
            return acc + jnp.exp2(one - highest)[:, None] * value

        acc = lax.fori_loop(jnp.int32(0), splits, add, jnp.zeros((HEADS, column.shape[1]), jnp.float32))
        result = acc / jnp.where(total > 0, total, 1.0)[:, None]
        plgpu.store(out_ref.at[row, head[:, None], column], result.astype(out_ref.dtype), mask=used)
