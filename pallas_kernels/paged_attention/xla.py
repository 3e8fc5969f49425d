"""Ragged paged attention in plain XLA: loops over the work list with dynamic trip counts, on any platform.

Work is proportional to the step's real lengths, never to the longest length allowed: an outer loop over items (one-row
items first, in a loop of their own), an inner loop over chunks of pages with an online softmax in float32. A row's
chunks depend on its own sequence only, so its result is the same, bit for bit, whatever else is in the batch.

Known limit: on jax 0.10.2 XLA:CPU widens a pool of a floating type other than float32 for each update of it. So
bfloat16 pages are kept as their bits on the CPU (`kv_pool_dtype`); float16 and float8 pages are for other platforms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Case, why_not_xla
from pallas_kernels.paged_attention.options import AttentionOptions
from pallas_kernels.paged_attention.pages import (
    from_page_dtype,
    is_tpu_layout,
    pack_tokens,
    to_page_dtype,
    tpu_to_plain,
    why_not_any_layout,
)
from pallas_kernels.paged_attention.plan import AttentionPlan

# Keys per step of the inner loop: 128 outweigh the cost of a loop step and waste little on the last, partly used chunk.
CHUNK_KEYS = 128
# Each page of a chunk is a slice of its own in the program; past 8 XLA:CPU's concatenation slows down twofold.
MAX_CHUNK_PAGES = 8
MASKED = -1e30  # first running maximum: finite, so that a fully masked chunk gives exp(0) and exp(-inf), never NaN


def why_not(case: Case) -> str | None:
    """Refuses no platform, but pages of an unknown layout, and to give the same bits in any company on accelerators."""
    return why_not_any_layout(case) or why_not_xla(case)


def paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array]:
    """Attends in XLA, see `pallas_kernels.paged_attention.paged_attention`. Padding rows give 0."""
    layer, scale, window, softcap, sinks, k_scale, v_scale = options
    k_new, v_new = to_page_dtype(k_new, k_scale, pages.dtype), to_page_dtype(v_new, v_scale, pages.dtype)
    pages = _write(k_new, v_new, pages, plan, layer)
    query = q.astype(jnp.float32) * (scale if k_scale is None else scale * jnp.asarray(k_scale, jnp.float32))

    def attend(rows: int, begin: jax.Array, end: jax.Array, out: jax.Array) -> jax.Array:
        def body(item: jax.Array, out: jax.Array) -> jax.Array:
            kv_heads = k_new.shape[1]
            return _attend_item(
                plan.items[item], rows, query, kv_heads, pages, plan, out, layer, window, softcap, sinks
            )

        return lax.fori_loop(begin, end, body, out)

    out = attend(1, jnp.zeros_like(plan.counts[0]), plan.counts[0], jnp.zeros_like(query))
    if plan.q_block > 1:
        out = attend(plan.q_block, plan.counts[0], plan.counts[1], out)
    if v_scale is not None:
        out = out * jnp.asarray(v_scale, jnp.float32)
    return out.astype(q.dtype), pages


def _write(
    k_new: jax.Array, v_new: jax.Array, pages: jax.Array, plan: AttentionPlan, layer: jax.Array | int
) -> jax.Array:
    """Puts the new rows [T, Hkv, D] into the pool, in place. Padding rows are left out altogether."""
    on_tpu = is_tpu_layout(pages.shape, k_new.shape[1], k_new.shape[2], pages.dtype.itemsize)
    page_size = jnp.int32(pages.shape[2 if on_tpu else 4])
    rows = pack_tokens(k_new, v_new) if on_tpu else jnp.stack([k_new, v_new], axis=1)[..., None, :]

    def write_row(row: jax.Array, pages: jax.Array) -> jax.Array:
        slot = plan.write_slot[row]
        page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)
        if on_tpu:
            return lax.dynamic_update_slice(pages, rows[row][None, None, None], (layer, page, offset, 0, 0, 0))
        return lax.dynamic_update_slice(pages, rows[row][None, None], (layer, page, 0, 0, offset, 0))

    num_rows = plan.q_start[plan.q_start.shape[0] - 1]
    return lax.fori_loop(jnp.zeros_like(num_rows), num_rows, write_row, pages)


def _attend_item(
    item: jax.Array,
    rows: int,
    query: jax.Array,
    num_kv_heads: int,
    pages: jax.Array,
    plan: AttentionPlan,
    out: jax.Array,
    layer: jax.Array | int,
    window: jax.Array | int | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Attends for one item of up to `rows` rows and puts its rows into out [T, Hq, D]; query is float32 and scaled."""
    num_tokens, num_heads, head_dim = query.shape
    on_tpu = is_tpu_layout(pages.shape, num_kv_heads, head_dim, pages.dtype.itemsize)
    page_size = pages.shape[2 if on_tpu else 4]
    group = num_heads // num_kv_heads
    chunk_pages = max(1, min(MAX_CHUNK_PAGES, CHUNK_KEYS // page_size, plan.block_tables.shape[1]))
    chunk_keys = chunk_pages * page_size

    seq, first_row, row_count, first_page, page_count = (item[column] for column in range(5))
    # A block that would run past the last row starts earlier: its first rows are then another item's, and are not kept.
    start = jnp.minimum(first_row, num_tokens - rows)
    row = start + jnp.arange(rows, dtype=jnp.int32)
    is_mine = (row >= first_row) & (row < first_row + row_count)
    row_to_position = plan.kv_len[seq] - plan.q_start[seq + 1]
    first_position = first_row + row_to_position
    last_position = first_position + row_count - 1
    position = jnp.clip(row + row_to_position, first_position, last_position)  # for others' rows, any with a key to see
    past_last_page = first_page + page_count
    oldest_key = jnp.zeros_like(first_position)
    if window is not None:
        oldest_key = jnp.maximum(first_position - window + 1, 0)
        first_page = jnp.maximum(first_page, lax.div(oldest_key, jnp.int32(page_size)))

    tile = lax.dynamic_slice_in_dim(query, start, rows)  # [rows, Hq, D] -> [Hkv, rows * G, D]
    tile = tile.reshape(rows, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    tile = tile.reshape(num_kv_heads, rows * group, head_dim)

    def chunk(
        index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        maximum, total, acc = state
        page_index = first_page + index * chunk_pages
        key_position = page_index * page_size + jnp.arange(chunk_keys, dtype=jnp.int32)
        k, v = _load_chunk(pages, plan.block_tables, layer, seq, page_index, chunk_pages, num_kv_heads, head_dim)
        # Slots that no row of this item sees may hold anything, NaN included, and 0 * NaN is NaN.
        written = (key_position >= oldest_key) & (key_position <= last_position)
        v = jnp.where(written[None, :, None], v, 0.0)

        scores = jnp.einsum("hmd,hkd->hmk", tile, k, preferred_element_type=jnp.float32)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        visible = key_position[None, :] <= position[:, None]
        if window is not None:
            visible &= key_position[None, :] > position[:, None] - window
        visible = jnp.broadcast_to(visible[:, None], (rows, group, chunk_keys)).reshape(1, rows * group, chunk_keys)
        scores = jnp.where(visible, scores, -jnp.inf)

        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        correction = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[..., None])
        total = total * correction + weights.sum(axis=-1)
        acc = acc * correction[..., None] + jnp.einsum("hmk,hkd->hmd", weights, v, preferred_element_type=jnp.float32)
        return new_maximum, total, acc

    # They are made like the tile, so that under shard_map the carry varies over the same mesh axes as what replaces it.
    zeros = jnp.zeros_like(tile[..., 0])
    maximum, total = zeros + MASKED, zeros
    if sinks is not None:  # a key of score `sink` without a value
        sink = sinks.astype(jnp.float32).reshape(num_kv_heads, 1, group)
        sink = jnp.broadcast_to(sink, (num_kv_heads, rows, group)).reshape(num_kv_heads, rows * group)
        maximum, total = zeros + sink, zeros + 1.0
    num_chunks = lax.div(past_last_page - first_page + chunk_pages - 1, jnp.int32(chunk_pages))
    _, total, acc = lax.fori_loop(jnp.zeros_like(num_chunks), num_chunks, chunk, (maximum, total, jnp.zeros_like(tile)))

    result = (acc / total[..., None]).reshape(num_kv_heads, rows, group, head_dim).transpose(1, 0, 2, 3)
    result = result.reshape(rows, num_heads, head_dim)
    if rows > 1:
        result = jnp.where(is_mine[:, None, None], result, lax.dynamic_slice_in_dim(out, start, rows))
    return lax.dynamic_update_slice_in_dim(out, result, start, axis=0)


def _load_chunk(
    pages: jax.Array,
    block_tables: jax.Array,
    layer: jax.Array | int,
    seq: jax.Array,
    page_index: jax.Array,
    count: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """Loads K and V [Hkv, count * C, D] float32 of `count` pages, from page_index in the block table of `seq`.

    It takes one slice per page and concatenates: so XLA:CPU copies whole rows of a page, where it copies single elements in a
    gather, at half the speed. Indices past the table's end give its last page; the caller masks those keys.
    """
    table = block_tables[seq]
    last = jnp.int32(block_tables.shape[1] - 1)
    ids = [table[jnp.minimum(page_index + offset, last)] for offset in range(count)]

    if is_tpu_layout(pages.shape, num_kv_heads, head_dim, pages.dtype.itemsize):
        size = (1, 1, *pages.shape[2:])
        tokens = jnp.concatenate([lax.dynamic_slice(pages, (layer, page, 0, 0, 0, 0), size)[0, 0] for page in ids])
        k, v = tpu_to_plain(tokens, num_kv_heads, head_dim)
        return from_page_dtype(k), from_page_dtype(v)

    def side(which: int) -> jax.Array:
        size = (1, 1, 1, num_kv_heads, *pages.shape[4:])
        parts = [lax.dynamic_slice(pages, (layer, page, which, 0, 0, 0), size)[0, 0, 0] for page in ids]
        return from_page_dtype(jnp.concatenate(parts, axis=1))

    return side(0), side(1)
