"""Prefill chunks and speculated tokens on TPU: attention of several rows of a sequence to one block of tokens.

The queries of a KV head are a matrix, [rows, group] folded into rows, and cut into tiles. A loop goes over the heads,
and takes those that share a word of the pages together. State: `many_*` [heads, rows * group, lanes].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention import tpu_softmax as softmax
from pallas_kernels.paged_attention.pages import HALF_LANES, LANES
from pallas_kernels.paged_attention.tpu_words import load_entry, load_rows, store_rows


def begin(refs: Any, static: Any, slot: jax.Array) -> None:
    """Sets the state before an item's first block."""
    del slot
    for head in range(refs.many_max.shape[0]):
        if static.sinks:
            pattern = refs.sinks[pl.ds(head * static.group, static.group), :]
            refs.many_max[head] = jnp.concatenate([pattern] * (refs.many_max.shape[1] // static.group), axis=0)
        else:
            refs.many_max[head] = jnp.full(refs.many_max.shape[1:], softmax.MASKED, jnp.float32)
        refs.many_sum[head] = jnp.full(refs.many_sum.shape[1:], 1 / LANES if static.sinks else 0.0, jnp.float32)
        refs.many_acc[head] = jnp.zeros(refs.many_acc.shape[1:], jnp.float32)


def step(refs: Any, static: Any, item: Any, position: jax.Array, tokens: Any, slot: jax.Array) -> None:
    """Attends to `tokens` [N, W, K, Dp], the first of which is at `position`; queries are in q buffer `slot`."""
    block, packing = tokens.shape[0], 4 // static.page_dtype.itemsize
    entries_per_head = 1 if static.head_dim <= HALF_LANES else 2
    heads_per_turn = max(1, packing // entries_per_head)
    words_per_turn = heads_per_turn * entries_per_head // packing
    num_tiles = pl.cdiv(item.num_rows, static.tile_rows)

    def turn(number: jax.Array, carry: None) -> None:
        for place in range(heads_per_turn):
            head = number * heads_per_turn + place
            at_k, at_v = softmax.entries(number * words_per_turn, place, static.head_dim, packing)
            refs.k_block[:block, :] = load_entry(tokens, at_k, static.page_dtype, static.dtype, static.interpret)
            refs.v_block[:block, :] = load_entry(tokens, at_v, static.page_dtype, static.dtype, static.interpret)

            def tile_step(tile: jax.Array, carry: None, head: Any = head) -> None:
                _tile(refs, static, item, position, block, slot, head, tile)
                return carry

            lax.fori_loop(0, num_tiles, tile_step, None)
        return carry

    lax.fori_loop(0, -(-static.num_kv_heads // heads_per_turn), turn, None)


def _tile(
    refs: Any,
    static: Any,
    item: Any,
    position: jax.Array,
    block: int,
    slot: jax.Array,
    head: jax.Array,
    tile: jax.Array,
) -> None:
    """Attends from one tile of one head's rows to that head's K and V."""
    first, rows = tile * static.tile_rows, static.tile_rows * static.group
    of_tile = refs.q_many.at[slot, head, pl.ds(first, static.tile_rows)]
    queries = load_rows(of_tile, refs.many_acc.shape[2], static.interpret)
    part = pl.ds(pl.multiple_of(first * static.group, rows), rows)
    products = softmax.dot(queries.astype(static.dtype), refs.k_block[:block, :], 1)
    scores = softmax.to_scores(products, refs.factors[0], static.softcap)
    # Rows past the item's last may see anything, as nobody reads them. (Leaving out the mask where all is visible saved no
    # bundles.)
    row = lax.broadcasted_iota(jnp.int32, (rows, block), 0) // static.group
    newest = item.first_position + first - position + row
    key = lax.broadcasted_iota(jnp.int32, (rows, block), 1)
    visible = key <= newest
    if static.window:
        visible &= key > newest - refs.integers[1]
    scores = jnp.where(visible, scores, -jnp.inf)
    weights, correction, maximum, total = softmax.update(
        scores, refs.many_max[head, part, :], refs.many_sum[head, part, :]
    )
    result = softmax.dot(weights.astype(static.dtype), refs.v_block[:block, :], 0)
    refs.many_acc[head, part, :] = refs.many_acc[head, part, :] * softmax.wide(correction, result.shape[1]) + result
    refs.many_max[head, part, :], refs.many_sum[head, part, :] = maximum, total


def end(refs: Any, static: Any, slot: jax.Array) -> None:
    """Puts the item's result into out buffer `slot`."""

    def one_head(head: jax.Array, carry: None) -> None:
        result = softmax.normalised(refs.many_acc[head], refs.many_sum[head], refs.factors[1], static.head_dim)
        store_rows(refs.out_many.at[slot, head], result, static.interpret)
        return carry

    lax.fori_loop(0, refs.many_acc.shape[0], one_head, None)
