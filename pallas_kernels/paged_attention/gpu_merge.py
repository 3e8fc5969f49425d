"""Merging what several units found for one row, by log-sum-exp (Triton)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.gpu_blocks import power_of_two

HEADS = 4
"""Query heads of a thread block."""


def merge_splits(
    out: jax.Array, partial: jax.Array, lse: jax.Array, merge: jax.Array, max_splits: int, interpret: bool = False
) -> jax.Array:
    """out [T, Hq, D] with the rows set that had several units.

    Args:
        out: updated in place; other rows stay.
        partial: Float32[Array, "R·max_splits Hq D"], normalised results of the units.
        lse: Float32[Array, "R·max_splits Hq"], base-2 logarithm of the sums of their exponentials.
        merge: Int32[Array, "R 2"], see `gpu_units.Units`.
        max_splits: rows of `partial` per slot.
    """
    num_heads = out.shape[1]
    return pl.pallas_call(
        functools.partial(_kernel, max_splits),
        grid=(merge.shape[0], pl.cdiv(num_heads, HEADS)),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"merge_splits_{max_splits}",
    )(merge, partial, lse, out)


def _kernel(max_splits: int, merge_ref, partial_ref, lse_ref, _, out_ref) -> None:
    _, num_heads, head_dim = out_ref.shape
    slot = pl.program_id(0)
    row, splits = merge_ref[slot, 0], merge_ref[slot, 1]
    head = pl.program_id(1) * HEADS + jnp.arange(HEADS, dtype=jnp.int32)
    column = jnp.arange(power_of_two(head_dim), dtype=jnp.int32)[None, :]

    @pl.when(splits > 1)
    def _merge() -> None:
        split = jnp.arange(power_of_two(max_splits), dtype=jnp.int32)[:, None]
        there = (split < splits) & (head < num_heads)[None, :]
        each = plgpu.load(lse_ref.at[slot * max_splits + split, head[None, :]], mask=there, other=-jnp.inf)
        highest = jnp.maximum(jnp.max(each, axis=0), -1e30)
        total = jnp.sum(jnp.exp2(each - highest[None, :]), axis=0)
        used = (head < num_heads)[:, None] & (column < head_dim)

        def add(index: jax.Array, acc: jax.Array) -> jax.Array:
            at = slot * max_splits + index
            one = plgpu.load(lse_ref.at[at, head], mask=head < num_heads, other=-jnp.inf)
            value = plgpu.load(partial_ref.at[at, head[:, None], column], mask=used, other=0.0)
            return acc + jnp.exp2(one - highest)[:, None] * value

        acc = lax.fori_loop(jnp.int32(0), splits, add, jnp.zeros((HEADS, column.shape[1]), jnp.float32))
        result = acc / jnp.where(total > 0, total, 1.0)[:, None]
        plgpu.store(out_ref.at[row, head[:, None], column], result.astype(out_ref.dtype), mask=used)
