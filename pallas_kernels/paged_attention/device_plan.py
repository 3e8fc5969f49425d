"""The plan of a step whose sequences, lengths and tables only the device knows: what `fill_plan` makes, under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import expect
from pallas_kernels.paged_attention.plan import ITEM_COLUMNS, AttentionPlan, PlanShape


def device_plan(
    counts: jax.Array,
    lengths: jax.Array,
    tables: jax.Array,
    *,
    tokens_per_seq: int,
    page_size: int,
    q_block: int,
) -> AttentionPlan:
    """Makes the plan of a step of up to K rows for each sequence, with room for T = S · K rows.

    Every entry is the one of `fill_plan` with PlanShape(T, S, B, q_block). Nothing can be refused here: a row whose position
    lies outside its block table is written to the null page, and its output may be anything. A table's entry of 0 is the
    null page too.

    Args:
        counts: Int32[Array, " S"], rows of each sequence in this step, 0 … K.
        lengths: Int32[Array, " S"], tokens of each sequence, those of this step included.
        tables: Int32[Array, "S B"] page ids in the order of the tokens; unused entries are 0.
        tokens_per_seq: K.
        page_size: C, tokens.
        q_block: wanted rows per work item, as of PlanShape.

    Raises:
        ValueError: at trace time, for shapes or dtypes other than these.
    """
    expect(tables.ndim == 2 and tables.dtype == jnp.int32, "tables", "int32 of shape [S, B]", tables)
    sequences, width = tables.shape
    for name, array in (("counts", counts), ("lengths", lengths)):
        expect(array.shape == (sequences,) and array.dtype == jnp.int32, name, f"int32 of shape [S={sequences}]", array)
    shape = PlanShape(sequences * tokens_per_seq, sequences, width, q_block)
    seqs = jnp.arange(sequences, dtype=jnp.int32)[:, None]
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    starts, contexts = (ends - counts)[:, None], (lengths - counts)[:, None]

    row = jnp.arange(tokens_per_seq, dtype=jnp.int32)[None]
    position = contexts + row  # [S, K]
    inside = (position >= 0) & (position < width * page_size)
    pages = jnp.take_along_axis(tables, jnp.clip(position // page_size, 0, width - 1), axis=1)
    slots = jnp.where(inside, pages * page_size + position % page_size, 0)
    places = jnp.where(row < counts[:, None], starts + row, shape.tokens)

    skipped = jnp.arange(0, tokens_per_seq, shape.q_rows, dtype=jnp.int32)[None]
    rows = jnp.clip(counts[:, None] - skipped, 0, shape.q_rows)  # of each sequence's items
    last_page = (contexts + skipped + rows - 1) // page_size
    # No item may have pages that are not in the table.
    columns = (seqs, starts + skipped, rows, jnp.zeros_like(rows), jnp.clip(last_page + 1, 1, width))
    items = jnp.stack(jnp.broadcast_arrays(*columns), axis=-1).reshape(-1, ITEM_COLUMNS)
    # Those of one row keep their order and come first, the others keep theirs: each goes to how many are before it.
    is_single, is_other = (rows == 1).reshape(-1), (rows > 1).reshape(-1)
    before_single, before_other = (jnp.cumsum(chosen, dtype=jnp.int32) for chosen in (is_single, is_other))
    num_single, num_other = before_single[-1], before_other[-1]
    item_places = jnp.where(is_other, num_single + before_other - 1, shape.num_items)
    item_places = jnp.where(is_single, before_single - 1, item_places)

    return AttentionPlan(
        block_tables=tables,
        q_start=jnp.concatenate([jnp.zeros_like(ends[:1]), ends]),
        kv_len=lengths,
        write_slot=_put(places.reshape(-1), slots.reshape(-1), shape.tokens),
        items=_put(item_places, items, shape.num_items),
        counts=jnp.stack([num_single, num_single + num_other]),
    )


def _put(places: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """Returns an array of `size` with the values at their places, which differ, and 0 elsewhere; leaves out those at `size`."""
    return jnp.zeros((size, *values.shape[1:]), values.dtype).at[places].set(values, mode="drop")
