"""Decode on TPU: attention of one row per sequence to one block of tokens.

With few query heads per KV head, the 8 rows of a register hold those of several KV heads (a bundle). Each head's rows are
multiplied with its own K (q is 0 in the bundle's other rows, so products add up) and, later, its own V. The state of bundle
b is in rows 8b … of `one_max`, `one_sum` and `one_acc`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention import tpu_softmax as softmax
from pallas_kernels.paged_attention.pages import LANES
from pallas_kernels.paged_attention.tpu_words import load_entry, load_rows, store_rows

AHEAD = 2  # bundles whose products with K are on their way while one is finished: this hides latency, yet spills little


def begin(refs: Any, static: Any, slot: jax.Array) -> None:
    """Sets the state before an item's first block; its query is in q buffer `slot`."""
    rows, fold = bundle_rows(static.group)
    queries = load_rows(refs.q_one.at[slot], refs.one_acc.shape[1], static.interpret).astype(jnp.float32)
    head_of_row = lax.broadcasted_iota(jnp.int32, (rows, queries.shape[1]), 0) // static.group
    for head in range(static.num_kv_heads):
        bundle = queries[head // fold * rows : (head // fold + 1) * rows]
        if fold > 1:
            bundle = jnp.where(head_of_row == head % fold, bundle, 0.0)
        refs.one_q[head] = bundle.astype(static.dtype)
    if static.sinks:
        refs.one_max[...] = refs.sinks[...]
    else:
        refs.one_max[...] = jnp.full(refs.one_max.shape, softmax.MASKED, jnp.float32)
    refs.one_sum[...] = jnp.full(refs.one_sum.shape, 1 / LANES if static.sinks else 0.0, jnp.float32)
    refs.one_acc[...] = jnp.zeros(refs.one_acc.shape, jnp.float32)


def bundle_rows(group: int) -> tuple[int, int]:
    """Returns the rows of a bundle, and its KV heads."""
    rows = max(softmax.ROWS, group)
    return rows, rows // group


def step(refs: Any, static: Any, item: Any, position: jax.Array, tokens: Any, slot: jax.Array) -> None:
    """Attends to `tokens` [N, W, K, Dp], the first of which is at `position`."""
    del slot
    (block, _, _, lanes), packing = tokens.shape, 4 // static.page_dtype.itemsize
    rows, fold = bundle_rows(static.group)
    key = position + lax.broadcasted_iota(jnp.int32, (rows, block), 1)
    visible = key < item.end
    if static.window:
        visible &= key >= item.end - refs.integers[1]
    head_of_row = lax.broadcasted_iota(jnp.int32, (rows, lanes), 0) // static.group

    def heads_of(bundle: int) -> range:
        return range(bundle * fold, min((bundle + 1) * fold, static.num_kv_heads))

    def load(head: int, side: int) -> jax.Array:
        at = softmax.entries(0, head, static.head_dim, packing)[side]
        return load_entry(tokens, at, static.page_dtype, static.dtype, static.interpret)

    def products(bundle: int) -> jax.Array:
        return sum_of([softmax.dot(refs.one_q[head], load(head, 0), 1) for head in heads_of(bundle)])

    def finish(bundle: int, raw: jax.Array) -> None:
        part = slice(bundle * rows, (bundle + 1) * rows)
        scores = jnp.where(visible, softmax.to_scores(raw, refs.factors[0], static.softcap), -jnp.inf)
        weights, correction, maximum, total = softmax.update(scores, refs.one_max[part, :], refs.one_sum[part, :])
        weights = weights.astype(static.dtype)
        first, *others = [softmax.dot(weights, load(head, 1), 0) for head in heads_of(bundle)]
        for place, other in enumerate(others, 1):
            first = jnp.where(head_of_row == place, other, first)
        refs.one_acc[part, :] = refs.one_acc[part, :] * softmax.wide(correction, lanes) + first
        refs.one_max[part, :], refs.one_sum[part, :] = maximum, total

    bundles = -(-static.num_kv_heads // fold)
    ready: list[jax.Array] = []
    for bundle in range(bundles + AHEAD):
        if bundle < bundles:
            ready.append(products(bundle))
        if bundle >= AHEAD and bundle - AHEAD < bundles:
            finish(bundle - AHEAD, ready[bundle - AHEAD])


def sum_of(parts: list[jax.Array]) -> jax.Array:
    """Returns the sum of arrays of one shape."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def end(refs: Any, static: Any, slot: jax.Array) -> None:
    """Puts the item's result into out buffer `slot`."""
    result = softmax.normalised(refs.one_acc[...], refs.one_sum[...], refs.factors[1], static.head_dim)
    store_rows(refs.out_one.at[slot], result, static.interpret)
