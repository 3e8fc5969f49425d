"""The TPU attention kernel's walk over the work list: which DMA starts and ends when (tpu_one_row and tpu_many_rows compute).

Two phases share the scratch memory: items of one row, then items of many. A phase goes through its items, and through
each item's pages in blocks. While one block is computed, the next, of the same item or the next one, is on its way:

    block tables   HBM → SMEM, one row per item, two items ahead
    q              HBM → VMEM, one item ahead
    K and V        HBM → VMEM, one block ahead: tokens from before this step out of pages, this step's out of `kv_new`
    new K and V    HBM → HBM, `kv_new` into pages, at any time while the item with the rows is at work
    out            VMEM → HBM, awaited when the buffer is used again

Old and new tokens come from different places, so nothing that a call reads is written in it, and no DMA has to wait
for another. Only tokens that exist are fetched; the rest of a block holds finite numbers from before, and is masked.

Where a device has two cores that share its memory (v4, v5p), each is a step of the grid and takes every other item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import tpu_many_rows, tpu_one_row
from pallas_kernels.paged_attention.plan import ITEM_COLUMNS
from pallas_kernels.paged_attention.tpu_words import as_words, fill_with_zero

TABLES = 4  # block tables in SMEM: one of the item at work, two on their way, one spare


@dataclass(frozen=True)
class Static:
    """Values known while compiling.

    Attributes:
        num_kv_heads: Hkv.
        group: G, rounded up to a power of two of at least one word; rows of q are [heads, group].
        head_dim: D.
        page_size: C.
        rows: most rows of an item.
        tile_rows: rows of an item that are multiplied at once, where it has several.
        decode_pages, mixed_pages: pages of a block in each phase.
        softcap: cap of the scores, in their units, or None.
        sinks, window: whether there are sinks, or a window.
        dtype: type of q, K and V in products: bfloat16 or float32.
        page_dtype: type of K and V in pages.
        cores: cores that share the work.
        interpret: whether the body runs in the interpreter, with twins for what that lacks.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    rows: int
    tile_rows: int
    decode_pages: int
    mixed_pages: int
    softcap: float | None
    sinks: bool
    window: bool
    dtype: Any
    page_dtype: Any
    cores: int
    interpret: bool


class Item(NamedTuple):
    """An item of the work list, in positions of its sequence; all int32 scalars."""

    seq: jax.Array
    first_row: jax.Array
    num_rows: jax.Array
    context: jax.Array  # tokens that were in the pages before this step
    first_position: jax.Array  # of the first row
    first_page: jax.Array  # in the block table
    end: jax.Array  # position after the last row's


class Walk(NamedTuple):
    """The items of a phase that a core works through, in turns 0 … num_items - 1."""

    begin: jax.Array
    stride: int
    num_items: jax.Array

    def item(self, turn: jax.Array) -> jax.Array:
        """Returns the index of the item whose turn it is."""
        return self.begin + turn * self.stride


class Refs(NamedTuple):
    """All arrays of the kernel, in the order of its arguments."""

    items: Any  # SMEM [N * 5]
    q_start: Any  # SMEM [S + 1]
    kv_len: Any  # SMEM [S]
    counts: Any  # SMEM [2]
    integers: Any  # SMEM [2]: layer, window
    factors: Any  # SMEM float32 [2]: of scores and of values
    tables: Any  # HBM [S, 1, B]
    q: Any  # HBM [T, heads, group, D]
    kv_new: Any  # HBM words [T, W, 1, Dp]; in the interpreter numbers [T, W, K, Dp], and so with `kv`
    sinks: Any  # VMEM float32 [heads * group, 128]
    pages_in: Any  # HBM, the same memory as `pages`
    out: Any  # HBM, as q
    pages: Any  # HBM [L, P, C, W, K, Dp]
    table: Any  # SMEM [TABLES, 1, B]
    kv: Any  # VMEM words [2, N, W, 1, Dp]
    zeros: Any  # VMEM [8, heads, group, D]
    q_one: Any  # VMEM [2, heads, group, D]
    q_many: Any  # VMEM [2, heads, rows, group, D]
    out_one: Any
    out_many: Any
    one_q: Any  # VMEM [heads, 8 or group, Dp]: each head's queries in its rows of a bundle, 0 in the others
    one_max: Any  # VMEM float32 [heads * group, 128]
    one_sum: Any  # the same
    one_acc: Any  # VMEM float32 [heads * group, Dp]
    many_max: Any  # VMEM float32 [heads, rows * group, 128]
    many_sum: Any  # the same
    many_acc: Any  # VMEM float32 [heads, rows * group, Dp]
    k_block: Any  # VMEM [N, Dp]
    v_block: Any  # VMEM [N, Dp]
    table_sem: Any  # DMA [TABLES]
    kv_sem: Any  # DMA [2]
    q_sem: Any  # DMA [2]
    out_sem: Any  # DMA [2]
    write_sem: Any  # DMA


def kernel(*args: Any, static: Static) -> None:
    """Runs as the body of the pallas_call; its grid has a step for each core."""
    refs = Refs(*args)
    refs = refs._replace(**{name: as_words(getattr(refs, name), static.interpret) for name in ("pages_in", "pages")})
    fill_with_zero(refs.kv, static.interpret)
    one, end = refs.counts[0], refs.counts[1]
    _phase(refs, static, jnp.int32(0), one, many=False)
    if static.rows > 1:
        _phase(refs, static, one, end, many=True)
    if static.cores == 1:
        _zero_padding(refs)
    else:
        pl.when(pl.program_id(0) == 0)(lambda: _zero_padding(refs))


def _zero_padding(refs: Refs) -> None:
    """Sets the output of rows past the last token to 0."""
    refs.zeros[...] = jnp.zeros(refs.zeros.shape, refs.zeros.dtype)
    first, rows = refs.q_start[refs.q_start.shape[0] - 1], refs.zeros.shape[0]
    left = refs.out.shape[0] - first

    def copy(number: jax.Array) -> Any:
        count = jnp.minimum(left - number * rows, rows)
        target = refs.out.at[pl.ds(first + number * rows, count)]
        return pltpu.make_async_copy(refs.zeros.at[pl.ds(0, count)], target, refs.write_sem)

    def start(number: jax.Array, carry: None) -> None:
        copy(number).start()
        return carry

    def wait(number: jax.Array, carry: None) -> None:
        copy(number).wait()
        return carry

    for do in (start, wait):
        lax.fori_loop(0, pl.cdiv(left, rows), do, None)


def _phase(refs: Refs, static: Static, begin: jax.Array, end: jax.Array, many: bool) -> None:
    """Works through this core's share of the items begin … end - 1, all of one row or all of many."""
    block = (static.mixed_pages if many else static.decode_pages) * static.page_size
    attention = tpu_many_rows if many else tpu_one_row
    walk, first = Walk(begin, 1, end - begin), jnp.int32(0)
    if static.cores > 1:
        begin = begin + pl.program_id(0)
        walk = Walk(begin, static.cores, lax.div(end - begin + static.cores - 1, jnp.int32(static.cores)))

    @pl.when(walk.num_items > 0)
    def _prologue() -> None:
        _table_copy(refs, walk, first).start()

        @pl.when(walk.num_items > 1)
        def _second() -> None:
            _table_copy(refs, walk, first + 1).start()

        _start_q(refs, walk, first, many)
        _table_copy(refs, walk, first).wait()
        _start_block(refs, static, walk, first, first, first, block)

    def item_body(turn: jax.Array, slot: jax.Array) -> jax.Array:
        item = _read_item(refs, static, walk.item(turn))
        q_slot = lax.rem(turn, jnp.int32(2))

        @pl.when(turn + 2 < walk.num_items)
        def _next_table() -> None:
            _table_copy(refs, walk, turn + 2).start()

        _write_new(refs, static, turn, item, wait=False)
        _wait_q(refs, item, q_slot, many)

        @pl.when(turn + 1 < walk.num_items)
        def _next_q() -> None:
            _start_q(refs, walk, turn + 1, many)

        attention.begin(refs, static, q_slot)
        num_blocks = pl.cdiv(item.end - item.first_page * static.page_size, block)

        def block_body(number: jax.Array, slot: jax.Array) -> jax.Array:
            last = number + 1 == num_blocks

            @pl.when(jnp.logical_and(last, turn + 1 < walk.num_items))
            def _next_table_is_here() -> None:
                _table_copy(refs, walk, turn + 1).wait()

            @pl.when(jnp.logical_or(jnp.logical_not(last), turn + 1 < walk.num_items))
            def _next_block() -> None:
                next_turn, next_number = jnp.where(last, turn + 1, turn), jnp.where(last, 0, number + 1)
                _start_block(refs, static, walk, next_turn, next_number, 1 - slot, block)

            position = item.first_page * static.page_size + number * block
            _wait_tokens(refs, jnp.minimum(item.end - position, block), slot)
            attention.step(refs, static, item, position, refs.kv.at[slot, pl.ds(0, block)], q_slot)
            return 1 - slot

        slot = lax.fori_loop(0, num_blocks, block_body, slot)

        @pl.when(turn >= 2)
        def _buffer_is_free() -> None:
            _copy_out(refs, _read_item(refs, static, walk.item(turn - 2)), q_slot, many, wait=True)

        attention.end(refs, static, q_slot)
        _copy_out(refs, item, q_slot, many, wait=False)
        _write_new(refs, static, turn, item, wait=True)
        return slot

    lax.fori_loop(first, walk.num_items, item_body, jnp.int32(0))

    for back in (2, 1):

        @pl.when(walk.num_items >= back)
        def _last_out(turn: jax.Array = walk.num_items - back) -> None:
            item = _read_item(refs, static, walk.item(turn))
            _copy_out(refs, item, lax.rem(turn, jnp.int32(2)), many, wait=True)


def _read_item(refs: Refs, static: Static, index: jax.Array) -> Item:
    seq, first_row, num_rows, first_page, _ = (refs.items[index * ITEM_COLUMNS + i] for i in range(ITEM_COLUMNS))
    kv_len, start, stop = refs.kv_len[seq], refs.q_start[seq], refs.q_start[seq + 1]
    context = kv_len - (stop - start)
    first_position = context + first_row - start
    if static.window:  # the plan's run covers every layer, but this layer may need less of it
        oldest = jnp.maximum(first_position - refs.integers[1] + 1, 0)
        first_page = jnp.maximum(first_page, lax.div(oldest, jnp.int32(static.page_size)))
    return Item(seq, first_row, num_rows, context, first_position, first_page, first_position + num_rows)


def _table_copy(refs: Refs, walk: Walk, turn: jax.Array) -> Any:
    slot = lax.rem(turn, jnp.int32(TABLES))
    seq = refs.items[walk.item(turn) * ITEM_COLUMNS]
    return pltpu.make_async_copy(refs.tables.at[seq], refs.table.at[slot], refs.table_sem.at[slot])


def _start_block(
    refs: Refs, static: Static, walk: Walk, turn: jax.Array, number: jax.Array, slot: jax.Array, block: int
) -> None:
    """Fetches block `number` of an item's tokens, min(block, tokens left) in all."""
    item = _read_item(refs, static, walk.item(turn))
    page_size, layer, table = static.page_size, refs.integers[0], lax.rem(turn, jnp.int32(TABLES))
    page = item.first_page + number * (block // page_size)
    position = page * page_size
    old = jnp.clip(jnp.minimum(item.context, item.end) - position, 0, block)
    tokens = refs.kv.at[slot]

    def copy_page(offset: jax.Array, carry: None) -> None:
        source = refs.pages_in.at[layer, refs.table[table, 0, page + offset]]
        left = jnp.minimum(old - offset * page_size, page_size)
        pltpu.make_async_copy(
            source.at[pl.ds(0, left)], tokens.at[pl.ds(offset * page_size, left)], refs.kv_sem.at[slot]
        ).start()
        return carry

    lax.fori_loop(0, pl.cdiv(old, page_size), copy_page, None)
    first_new = jnp.maximum(position, item.context)
    count = jnp.minimum(item.end, position + block) - first_new

    @pl.when(count > 0)
    def _copy_new() -> None:
        row = item.first_row + first_new - item.first_position
        pltpu.make_async_copy(
            refs.kv_new.at[pl.ds(row, count)],
            tokens.at[pl.ds(first_new - position, count)],
            refs.kv_sem.at[slot],
        ).start()


def _wait_tokens(refs: Refs, count: jax.Array, slot: jax.Array) -> None:
    """Waits for `count` tokens, however many copies brought them: a DMA semaphore counts bytes."""
    tokens = refs.kv.at[slot, pl.ds(0, count)]
    pltpu.make_async_copy(tokens, tokens, refs.kv_sem.at[slot]).wait()


def _start_q(refs: Refs, walk: Walk, turn: jax.Array, many: bool) -> None:
    slot, index = lax.rem(turn, jnp.int32(2)), walk.item(turn)
    row, count = refs.items[index * ITEM_COLUMNS + 1], refs.items[index * ITEM_COLUMNS + 2]
    if not many:
        pltpu.make_async_copy(refs.q.at[row], refs.q_one.at[slot], refs.q_sem.at[slot]).start()
        return
    for head in range(refs.q.shape[1]):  # strided, as the buffer has the rows of a head together
        pltpu.make_async_copy(
            refs.q.at[pl.ds(row, count), head],
            refs.q_many.at[slot, head, pl.ds(0, count)],
            refs.q_sem.at[slot],
        ).start()


def _wait_q(refs: Refs, item: Item, slot: jax.Array, many: bool) -> None:
    if not many:
        pltpu.make_async_copy(refs.q_one.at[slot], refs.q_one.at[slot], refs.q_sem.at[slot]).wait()
        return
    for head in range(refs.q.shape[1]):
        rows = refs.q_many.at[slot, head, pl.ds(0, item.num_rows)]
        pltpu.make_async_copy(rows, rows, refs.q_sem.at[slot]).wait()


def _copy_out(refs: Refs, item: Item, slot: jax.Array, many: bool, wait: bool) -> None:
    """Starts, or waits for, the copy of an item's results to its rows of `out`."""
    if many:
        copies = [
            pltpu.make_async_copy(
                refs.out_many.at[slot, head, pl.ds(0, item.num_rows)],
                refs.out.at[pl.ds(item.first_row, item.num_rows), head],
                refs.out_sem.at[slot],
            )
            for head in range(refs.q.shape[1])
        ]
    else:
        copies = [pltpu.make_async_copy(refs.out_one.at[slot], refs.out.at[item.first_row], refs.out_sem.at[slot])]
    for copy in copies:
        if wait:
            copy.wait()
        else:
            copy.start()


def _write_new(refs: Refs, static: Static, turn: jax.Array, item: Item, wait: bool) -> None:
    """Starts, or waits for, the copies of the item's new K and V into its pages, one per page."""
    page_size, layer = static.page_size, refs.integers[0]
    table = lax.rem(turn, jnp.int32(TABLES))
    first = lax.div(item.first_position, jnp.int32(page_size))

    def write_page(page: jax.Array, carry: None) -> None:
        begin = jnp.maximum(item.first_position, page * page_size)
        count = jnp.minimum(item.end, (page + 1) * page_size) - begin
        target = refs.pages.at[layer, refs.table[table, 0, page], pl.ds(begin - page * page_size, count)]
        source = refs.kv_new.at[pl.ds(item.first_row + begin - item.first_position, count)]
        copy = pltpu.make_async_copy(source, target, refs.write_sem)
        if wait:
            copy.wait()
        else:
            copy.start()
        return carry

    lax.fori_loop(first, lax.div(item.end - 1, jnp.int32(page_size)) + 1, write_page, None)
