"""The body of the native CPU paged attention: K/V written in place, then the work list walked by a few threads.

The arithmetic of a row is in `cpu_softmax`; here is who does what, and the copy of pages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I1, I8, I64, Emitter, Ptr, Value
from pallas_kernels.paged_attention.cpu_softmax import (
    GROUP_ROWS,
    SPLIT_KEYS,
    Item,
    SplitAttention,
    State,
    Variant,
    own_scales,
    page_block,
    page_values,
)
from pallas_kernels.paged_attention.page_width import SMALLEST_SCALE

WRITE_ROWS = 16  # token rows per task of the write
SPLIT_TASKS = 32  # with fewer (item, head) pairs than this, threads share decode items split by split
COPY_BYTES = 64  # bytes per step of a page copy


def store_scale(k: Emitter, a: Frame, source: Ptr, block: Ptr, offset: Value, variant: Variant) -> Value:
    """Stores the scale of a token's head, as `pages.to_page_dtype` computes it; returns what its numbers are multiplied by."""
    width = variant.lanes(k)
    parts = [k.abs(source.load(i, width)) for i in range(0, variant.head_dim, width)]
    own = k.max_lanes(functools.reduce(k.max, parts)) * (1 / 127)
    own_scales(a, block, variant)[offset] = own
    return k.select(own >= SMALLEST_SCALE, k.const(F32, 1.0) / own, 0.0)


def write_rows(k: Emitter, a: Frame, number: Value, variant: Variant) -> None:
    """Stores the new K and V of WRITE_ROWS token rows; zeroes the output of padding rows."""
    d, lanes = variant.head_dim, variant.lanes(k)
    used = k.min(a.q_start[a.S].to(I64), a.T)
    with k.range(number * WRITE_ROWS, k.min(number * WRITE_ROWS + WRITE_ROWS, a.T)) as row:
        with k.when_else(row < used) as (token, padding):
            with token:
                slot = a.write_slot[row].to(I64)
                page, offset = slot // a.C, slot % a.C
                with k.range(0, a.Hkv) as head:
                    for which, (new, scale) in enumerate(((a.k_new, a.k_scale), (a.v_new, a.v_scale))):
                        block = page_block(k, a, page, which, head, variant)
                        source = new + (row * a.Hkv + head) * d
                        inverse = store_scale(k, a, source, block, offset, variant) if variant.own_scales else None
                        for i in range(0, d, lanes):
                            x = source.load(i, lanes)
                            if inverse is not None:
                                x = x * inverse
                            stored = page_values(k, x / scale[0] if variant.scales else x, variant.page_dtype)
                            if which:
                                block.store(offset * d + i, stored)
                            else:
                                for lane in range(lanes):
                                    block[(i + lane) * a.C + offset] = stored.lane(lane)
            with padding, k.range(0, a.Hq * d, lanes) as i:
                a.out.store(row * a.Hq * d + i, k.zeros(F32, lanes))


def write_out(k: Emitter, a: Frame, variant: Variant, item: Item, state: State, first: Value, count: Value) -> None:
    """Writes weighted sum / sum to `out` for `count` rows from `first` of each head."""
    with k.range(0, item.heads) as head, k.range(0, count) as i:
        row, here = first + i, head * item.group + i
        column = (item.head + head) * item.group + row % item.group
        at = ((item.first_row + row // item.group) * a.Hq + column) * state.d
        factor = k.const(F32, 1.0) / state.total[here]
        factor = factor * a.v_scale[0] if variant.scales else factor
        for v in range(0, state.d, state.lanes):
            a.out.store(at + v, state.acc.load(here * state.d + v, state.lanes) * factor)


def attend(k: Emitter, a: Frame, number: Value, variant: Variant) -> None:
    """Attends for heads of one item, or one split of them: one head of an item of several rows, `heads` of an item of one row.

    With `max_splits` = 0 the task does all splits and writes the result; items of several rows come first, of these the
    later ones, which are longer in a prefill. Otherwise all items have one row, task number = (item, heads, split), and the
    split's state goes to `partial`, as if it were the only one.
    """
    shared = a.max_splits > 0
    splits, blocks = k.max(a.max_splits, 1), (a.Hkv + a.heads - 1) // a.heads
    of_many = (a.num_items - a.num_single) * a.Hkv
    many = number < of_many
    single = (number - of_many) // splits
    which = k.select(many, a.num_items - 1 - number // a.Hkv, single // blocks)
    first_head = k.select(many, number % a.Hkv, single % blocks * a.heads)
    item = Item(k, a, which, first_head, k.select(many, k.i64(1), k.min(a.heads, a.Hkv - first_head)))
    begin = k.select(shared, item.first_split + number % splits, item.first_split)
    stop = k.select(shared, k.min(begin + 1, item.end_split), item.end_split)
    state = State(k, variant)
    attention = SplitAttention(k, a, variant, item, state)
    with k.range(0, item.rows, GROUP_ROWS) as base:
        end = k.min(base + GROUP_ROWS, item.rows)
        state.clear(k, a, variant, item, base, end - base, shared)
        with k.range(begin, stop) as split:
            attention.rows(split, base, end, base)
        with k.when_else(shared) as (partial, complete):
            with partial, k.range(0, item.heads) as head:
                target = a.partial + ((which * a.Hkv + first_head + head) * splits + number % splits) * a.width
                rows, row = item.rows, head * item.group
                with k.range(0, rows) as i:
                    target[i], target[i + rows] = state.maximum[row + i], state.total[row + i]
                with k.range(0, rows * variant.head_dim, state.lanes) as i:
                    target.store(i + rows * 2, state.acc.load(i + row * variant.head_dim, state.lanes))
            with complete:
                write_out(k, a, variant, item, state, base, end - base)


def merge_splits(k: Emitter, a: Frame, pair: Value, variant: Variant) -> None:
    """Merges the splits of one (item, head) in order and writes the result."""
    item = Item(k, a, pair // a.Hkv, pair % a.Hkv)
    state, zero, d = State(k, variant), k.i64(0), variant.head_dim
    state.clear(k, a, variant, item, zero, item.rows, k.const(I1, 0))
    with k.range(0, item.end_split - item.first_split) as split:
        source = a.partial + (pair * a.max_splits + split) * a.width
        with k.range(0, item.rows) as i:
            factors = state.merge_sums(k, i, source[i], source[i + item.rows])
            for v in range(0, d, state.lanes):
                state.merge_acc(k, i * d + v, source.load((i + item.rows * 2) + i * (d - 1) + v, state.lanes), *factors)
    write_out(k, a, variant, item, state, zero, item.rows)


def body(k: Emitter, a: Frame, variant: Variant) -> None:
    """Checks what the buffers' sizes do not say, writes the rows and attends."""
    a.require((a.Hq % a.Hkv).eq(0), "argument q: its heads are not a multiple of the KV heads")
    a.require((a.C % 16).eq(0) & (a.C <= SPLIT_KEYS), f"argument pages: page size is not 16, 32 … {SPLIT_KEYS}")
    a.require(a.S1.eq(a.S + 1), "argument q_start: expected one entry more than kv_len")
    layer, num_items, num_single = (x.to(I64) for x in (a.layer[0], a.counts[1], a.counts[0]))
    a.require((layer >= 0) & (layer < a.L), "argument layer is out of range")
    good = (num_single >= 0) & (num_single <= num_items) & (num_items <= a.N)
    a.require(good, "argument counts does not fit items")
    valid, max_splits = k.var(k.const(I1, 1)), k.var(k.i64(1))
    with k.range(0, num_items) as i:
        seq, first, rows = (a.items[i * 5 + column].to(I64) for column in range(3))
        inside = (seq >= 0) & (seq < a.S) & (first >= 0) & (rows >= 0) & (first + rows <= a.T)
        page, pages = (a.items[i * 5 + column].to(I64) for column in (3, 4))
        valid.v = valid.v & inside & (page >= 0) & (pages >= 0) & (page + pages <= a.B)
        with k.when(valid.v):
            item = Item(k, a, i, k.i64(0))
            max_splits.v = k.max(max_splits.v, item.end_split - item.first_split)
    a.require(valid.v, "argument items names rows, a sequence or pages that are not there")

    a.parallel((a.T + (WRITE_ROWS - 1)) // WRITE_ROWS, lambda k, a, i: write_rows(k, a, i, variant))
    pairs, splits, group = num_items * a.Hkv, max_splits.v, a.Hq // a.Hkv
    share = num_single.eq(num_items) & (pairs < SPLIT_TASKS) & (splits > 1) & (pairs * splits <= a.slots)
    share = share & (group <= GROUP_ROWS) & (group * (variant.head_dim + 2) <= a.width)
    # A page's heads lie side by side, and a long run of memory comes faster: a task has as many heads as leave work for all.
    splits = k.select(share, splits, k.i64(1))
    max_heads = k.min(k.i64(GROUP_ROWS) // group, a.Hkv)
    heads = k.max(k.min(pairs * splits * 2 // a.num_threads(), max_heads), 1)
    extra = {"num_items": num_items, "num_single": num_single, "heads": heads}
    extra["max_splits"] = k.select(share, splits, k.i64(0))
    tasks = (num_items - num_single) * a.Hkv + num_single * ((a.Hkv + heads - 1) // heads) * splits
    a.parallel(tasks, lambda k, a, i: attend(k, a, i, variant), **extra)
    with k.when(share):
        a.parallel(pairs, lambda k, a, i: merge_splits(k, a, i, variant), **extra)


def copy_pages_body(k: Emitter, a: Frame, inner: Sequence[str], itemsize: int) -> None:
    """Copies the first `count` pairs, one page of one layer per task; `inner` names a page's dimensions."""
    a.require((a.count[0] >= 0) & (a.count[0].to(I64) <= a.N), "argument count is more than the pairs, or negative")
    size = k.i64(itemsize)
    for name in inner:
        size = size * getattr(a, name)

    def task(k: Emitter, a: Frame, number: Value) -> None:
        pair, layer = number // a.L, number % a.L
        source, target = a.src[pair].to(I64), a.dst[pair].to(I64)
        inside = (source >= 0) & (source < a.P) & (target >= 0) & (target < a.P)
        with k.when(inside):
            pool = a.pages_out.as_(I8) + layer * a.P * a.page_bytes
            to, origin = pool + target * a.page_bytes, pool + source * a.page_bytes
            whole = a.page_bytes // COPY_BYTES * COPY_BYTES
            with k.range(0, whole, COPY_BYTES) as i:
                to.store(i, origin.load(i, COPY_BYTES))
            with k.range(whole, a.page_bytes) as i:
                to[i] = origin[i]

    a.parallel(a.count[0].to(I64) * a.L, task, page_bytes=size)
