"""Cuts the plan's work items into pieces for one thread block of a GPU: units of (tile of query rows, run of pages).

A long run of keys is split over several units, so that a few sequences fill the whole chip (Dao et al., "Flash-Decoding",
2023); the results of a row's units are merged by log-sum-exp. The split depends on the item alone, never on its neighbours
in the batch. These few XLA operations on small integers read only the plan, so XLA computes them once for all layers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.plan import AttentionPlan

Part = Literal["all", "one", "many"]
ALL_ROWS_SPLIT = 64
"""Up to this bucket, items of several rows are split too; above, only items of one row (the partial results of all rows
would fill the memory, and there are enough units without splitting)."""


class Units(NamedTuple):
    """Work units of one step, int32.

    Shapes:
        units: [U, 8]: sequence, first row of the item, rows of the item, position of the item's first row, first query of
            the tile (of the rows × G of the item), first page index, past the last page index, where the partial result
            goes: split + max_splits × slot, or -1 where the result is final.
        num_units: [1], number of units; those with the longest runs come last.
        merge: [R, 2] for each slot of partial results: the row it belongs to, and how many splits it has (0: none).
    """

    units: jax.Array
    num_units: jax.Array
    merge: jax.Array


def partial_slots(plan: AttentionPlan) -> int:
    """Returns R, the number of rows whose partial results can be kept."""
    tokens, sequences = plan.write_slot.shape[0], plan.kv_len.shape[0]
    return tokens if tokens <= ALL_ROWS_SPLIT else min(tokens, sequences)


def make_units(
    plan: AttentionPlan,
    *,
    page_size: int,
    group: int,
    tile: int,
    split_keys: int,
    max_splits: int,
    window: jax.Array | int | None,
    align_keys: int = 1,
    part: Part = "all",
) -> Units:
    """Cuts the plan's items into units.

    Args:
        plan: the step's plan.
        page_size: C.
        group: G, query heads per KV head.
        tile: queries (row, head of the group) of a unit.
        split_keys: least keys of a unit, where there are more of them.
        max_splits: most units over the keys of one tile; 1 does not split.
        window: tokens that a row sees; pages before them are left out.
        align_keys: a run of keys begins at a multiple of this, where that is more than a page.
        part: "all" items; or only those of "one" row, whose results are then all partial, with the row as the slot; or only those
            of "many" rows.
    """
    tokens, num_items = plan.write_slot.shape[0], plan.items.shape[0]
    rows_split = tokens <= ALL_ROWS_SPLIT or part == "one"
    slots = tokens if part == "one" else partial_slots(plan)
    seq, first_row, rows, first_page, pages = (plan.items[:, column] for column in range(5))
    index = jnp.arange(num_items, dtype=jnp.int32)
    used = index < plan.counts[1]
    if part != "all":
        used &= (rows == 1) == (part == "one")
    first_position = plan.kv_len[seq] - plan.q_start[seq + 1] + first_row
    end_page = first_page + pages
    if window is not None:
        oldest = jnp.maximum(first_position - window + 1, 0)
        least = max(align_keys, page_size)
        oldest_page = lax.div(oldest, jnp.int32(least)) * (least // page_size)
        first_page = jnp.maximum(first_page, oldest_page)
    pages = end_page - first_page

    can_split = used if rows_split else used & (rows == 1) & (index < slots)
    pages_per_split = -(-split_keys // page_size)
    wanted = lax.div(pages + (pages_per_split - 1), jnp.int32(pages_per_split))
    splits = jnp.where(can_split, jnp.clip(wanted, 1, max_splits), 1)
    share = lax.div(pages + splits - 1, splits)  # pages of a split
    # Rounding the share up can leave nothing for the last splits.
    splits = jnp.where(pages > 0, lax.div(pages + share - 1, jnp.maximum(share, 1)), 1)
    tiles = lax.div(rows * group + (tile - 1), jnp.int32(tile))
    of_item = jnp.where(used, tiles * splits, 0)
    ends = jnp.cumsum(of_item, dtype=jnp.int32)

    # A one-row item has ceil(G / tile) tiles, all items together have at most N + T · G / tile.
    max_tiles = num_items + tokens * group // tile
    max_split = max_tiles if rows_split else slots * -(-group // tile)
    most = max_tiles + max_split * (max_splits - 1)
    unit = jnp.arange(most, dtype=jnp.int32)
    item = jnp.sum(ends[None, :] <= unit[:, None], axis=1, dtype=jnp.int32)
    item = jnp.minimum(item, num_items - 1)
    within = unit - (ends - of_item)[item]
    split = lax.div(within, jnp.maximum(tiles[item], 1))
    begin = first_page[item] + split * share[item]
    end = jnp.minimum(begin + share[item], end_page[item])
    slot = first_row if rows_split else index
    least = 1 if part == "one" else 2
    where = jnp.where(splits[item] >= least, slot[item] * max_splits + split, -1)
    first_query = lax.rem(within, jnp.maximum(tiles[item], 1)) * tile
    columns = (seq[item], first_row[item], rows[item], first_position[item], first_query, begin, end, where)

    if rows_split:
        row = jnp.arange(tokens, dtype=jnp.int32)
        mine = used[None] & (first_row[None] <= row[:, None]) & (row[:, None] < (first_row + rows)[None])
        row_splits = jnp.sum(jnp.where(mine, splits[None], 0), axis=1, dtype=jnp.int32)
    else:
        row = first_row[:slots]
        row_splits = jnp.where(used & (rows == 1), splits, 0)[:slots]
    merge = jnp.stack([row, jnp.where(row_splits >= least, row_splits, 0)], axis=1)
    return Units(jnp.stack(columns, axis=1), ends[-1:], merge)
