"""The body of the native CPU paged attention: K/V written in place, then the work list walked by a few threads.

A row's softmax is taken split by split: SPLIT_KEYS keys at absolute positions, each with a maximum, a sum and a weighted sum
of its own, merged in order. That is what lets threads share a long context, and it fixes the order of every sum, so a row's
result is the same bits in any batch, any chunk of a prefill, on any number of threads.
(Online softmax: Milakov & Gimelshein 2018; splits over keys: flash-decoding, Dao et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F16, F32, I1, I8, I16, I32, I64, Emitter, Ptr, Value, Var, element_bytes

SPLIT_KEYS = 256  # 128 KiB of K and V a head at D = 64: stays in L2 while the rows of an item pass
GROUP_ROWS = 48  # (token, head) rows that are worked on together
BLOCK_ROWS = 3  # of them in registers: 3 rows x 4 keys (or 4 vectors of V) is 12 accumulators
WRITE_ROWS = 16  # token rows per task of the write
SPLIT_TASKS = 32  # with fewer (item, head) pairs than this, decode items are shared out split by split
PREFETCH_MOST_ROWS = 16  # items of more rows find K in the L2 cache: there the prefetches would only cost
LINE_BYTES = 64
COPY_BYTES = 64  # bytes per step of a page copy
FIRST_MAXIMUM = -1e30  # finite, so that two empty maxima compare as exp(0)
PAGE_ELEMENT = {"float32": F32, "uint16": I16, "bfloat16": I16, "float16": I16, "int8": I8}


@dataclass(frozen=True)
class Variant:
    """What is compiled in."""

    head_dim: int
    page_dtype: str
    softcap: bool
    sinks: bool
    scales: bool

    @property
    def name(self) -> str:
        flags = "".join(f"_{flag}" for flag in ("softcap", "sinks", "scales") if getattr(self, flag))
        return f"paged_attention_{self.page_dtype}_d{self.head_dim}{flags}"


def split_pages(k: Emitter, a: Frame) -> Value:
    """Pages per split: as many as make SPLIT_KEYS keys, at least one."""
    return k.max(k.i64(SPLIT_KEYS) // a.C, 1)


def load_page(k: Emitter, pages: Ptr, index: Value | int, dtype: str, count: int) -> Value:
    """`count` page elements as float32, before the multiplication by a scale."""
    raw = pages.load(index, count)
    if dtype == "float32":
        return raw
    if dtype == "int8":
        return raw.to(I32).to(F32)
    if dtype == "float16":
        return raw.bits(ir.VectorType(F16, count)).to(F32)
    return k.bf16_to_f32(raw)


def store_page(k: Emitter, pages: Ptr, index: Value | int, x: Value, dtype: str) -> None:
    """float32 as `pages.to_page_dtype` stores it: nearest even; int8 clipped to ±127."""
    if dtype == "int8":
        clipped = k.max(k.min(k.round_even(x), 127.0), -127.0)
        pages.store(index, clipped.to(I8))
    elif dtype == "float16":
        pages.store(index, x.to(F16).bits(ir.VectorType(I16, x.type.count)))
    elif dtype == "float32":
        pages.store(index, x)
    else:
        pages.store(index, k.f32_to_bf16(x))


def page_block(k: Emitter, a: Frame, page: Value, which: int, head: Value, d: int) -> Ptr:
    """K (which = 0) or V (1) of one head of one page: [C, D]. A page id outside the pool means the null page."""
    page = k.select((page >= 0) & (page < a.P), page, k.i64(0))
    return a.pages_out + (((a.layer[0].to(I64) * a.P + page) * 2 + which) * a.Hkv + head) * a.C * d


def write_rows(k: Emitter, a: Frame, number: Value, variant: Variant) -> None:
    """Store the new K and V of WRITE_ROWS token rows; zero the output of padding rows."""
    d, lanes = variant.head_dim, k.lanes
    used = k.min(a.q_start[a.S].to(I64), a.T)
    with k.range(number * WRITE_ROWS, k.min(number * WRITE_ROWS + WRITE_ROWS, a.T)) as row:
        with k.when_else(row < used) as (token, padding):
            with token:
                slot = a.write_slot[row].to(I64)
                page, offset = slot // a.C, slot % a.C
                with k.range(0, a.Hkv) as head:
                    for which, (new, scale) in enumerate(((a.k_new, a.k_scale), (a.v_new, a.v_scale))):
                        target = page_block(k, a, page, which, head, d) + offset * d
                        source = new + (row * a.Hkv + head) * d
                        for i in range(0, d, lanes):
                            x = source.load(i, lanes)
                            store_page(k, target, i, x / scale[0] if variant.scales else x, variant.page_dtype)
            with padding, k.range(0, a.Hq * d, lanes) as i:
                a.out.store(row * a.Hq * d + i, k.zeros(F32, lanes))


class Item:
    """One work item and KV head: where its rows and keys are."""

    def __init__(self, k: Emitter, a: Frame, item: Value, head: Value) -> None:
        columns = [a.items[item * 5 + i].to(I64) for i in range(5)]
        self.seq, self.first_row, rows, first_page, page_count = columns
        self.head, self.group = head, a.Hq // a.Hkv
        self.rows = rows * self.group
        self.shift = (a.kv_len[self.seq] - a.q_start[self.seq + 1]).to(I64)  # position of a row = row + shift
        self.window = k.max(a.window[0].to(I64), 1)
        first, last = self.first_row + self.shift, self.first_row + rows - 1 + self.shift
        self.first_page = k.max(first_page, k.max(first - self.window + 1, 0) // a.C)
        self.end_page = k.min(first_page + page_count, k.max(last, 0) // a.C + 1)
        self.first_split = self.first_page // split_pages(k, a)
        self.end_split = (self.end_page + split_pages(k, a) - 1) // split_pages(k, a)


class State:
    """Running maximum, sum and weighted sum of up to GROUP_ROWS rows, on the stack (or read from partial results)."""

    def __init__(self, k: Emitter, d: int) -> None:
        self.maximum, self.total = k.scratch(F32, GROUP_ROWS), k.scratch(F32, GROUP_ROWS)
        self.acc, self.d = k.scratch(F32, GROUP_ROWS * d), d

    def clear(
        self, k: Emitter, a: Frame, variant: Variant, item: Item, first: Value, count: Value, partial: Value
    ) -> None:
        """No key yet; with sinks (and the state not one that is merged later), one key of score `sink` without value."""
        with k.range(0, count) as i:
            self.maximum[i], self.total[i] = FIRST_MAXIMUM, 0.0
            if variant.sinks:
                with k.when(partial ^ 1):
                    sink = a.sinks[item.head * item.group + (first + i) % item.group]
                    self.maximum[i], self.total[i] = sink, 1.0
        with k.range(0, count * self.d, k.lanes) as i:
            self.acc.store(i, k.zeros(F32, k.lanes))

    def merge_sums(self, k: Emitter, i: Value, maximum: Value, total: Value) -> tuple[Value, Value]:
        """Take in a split's maximum and sum; returns the factors of the old and of the split's weighted sum."""
        new = k.max(self.maximum[i], maximum)
        old_factor, factor = k.exp(self.maximum[i] - new), k.exp(maximum - new)
        self.total[i] = k.fma(total, factor, self.total[i] * old_factor)
        self.maximum[i] = new
        return old_factor, factor

    def merge_acc(self, k: Emitter, at: Value, split: Value, old_factor: Value, factor: Value) -> None:
        self.acc.store(at, k.fma(split, factor, self.acc.load(at, k.lanes) * old_factor))


def write_out(k: Emitter, a: Frame, variant: Variant, item: Item, state: State, first: Value, count: Value) -> None:
    """out = weighted sum / sum for `count` rows from `first`."""
    with k.range(0, count) as i:
        row = first + i
        at = ((item.first_row + row // item.group) * a.Hq + item.head * item.group + row % item.group) * state.d
        factor = k.const(F32, 1.0) / state.total[i]
        factor = factor * a.v_scale[0] if variant.scales else factor
        for v in range(0, state.d, k.lanes):
            a.out.store(at + v, state.acc.load(i * state.d + v, k.lanes) * factor)


class SplitAttention:
    """One split for a few (1 … BLOCK_ROWS) rows: scores, softmax within the split, weighted sum, merged into the state."""

    def __init__(self, k: Emitter, a: Frame, variant: Variant, item: Item, state: State) -> None:
        self.k, self.a, self.variant, self.item, self.state = k, a, variant, item, state
        self.scores = k.scratch(F32, BLOCK_ROWS * SPLIT_KEYS)
        self.table = a.block_tables + item.seq * a.B
        scale = a.scale[0] * a.k_scale[0] if variant.scales else a.scale[0]
        self.scale = scale

    def run(self, split: Value, first: Value, base: Value, count: int) -> None:
        """Rows first … first + count - 1 of the item; their state is at first - base."""
        k, a, item = self.k, self.a, self.item
        pages = split_pages(k, a)
        start = split * pages
        rows = [first + i for i in range(count)]
        positions = [item.first_row + row // item.group + item.shift for row in rows]
        oldest = k.max(positions[0] - item.window + 1, 0)
        first_page = k.max(k.max(item.first_page, start), oldest // a.C)
        end_page = k.min(k.min(item.end_page, start + pages), positions[-1] // a.C + 1)
        with k.when(first_page < end_page):
            self._scores(rows, start, first_page, end_page)
            factors = []
            for i, position in enumerate(positions):
                low = k.max(position - item.window + 1, 0) - start * a.C
                bounds = (first_page - start) * a.C, (end_page - start) * a.C
                maximum, total = self._softmax(i, bounds, low, position + 1 - start * a.C)
                factors.append(self.state.merge_sums(k, rows[i] - base, maximum, total))
            low, high = oldest, positions[-1] + 1
            self._values(count, first - base, factors, start, first_page, end_page, low, high)

    def _scores(self, rows: list[Value], start: Value, first_page: Value, end_page: Value) -> None:
        k, a, d, lanes = self.k, self.a, self.variant.head_dim, self.k.lanes
        group, head = self.item.group, self.item.head
        q = [a.q + ((self.item.first_row + row // group) * a.Hq + head * group + row % group) * d for row in rows]
        with k.range(first_page, end_page) as page:
            keys = page_block(k, a, self.table[page].to(I64), 0, head, d)
            next_keys = page_block(k, a, self.table[k.min(page + 1, end_page - 1)].to(I64), 0, head, d)
            with k.range(0, a.C, 4) as key:
                with k.when(self.item.rows <= PREFETCH_MOST_ROWS):
                    for line in range(0, 4 * d, LINE_BYTES // element_bytes(next_keys.element)):
                        (next_keys + (key * d + line)).prefetch(0)
                acc: list[list[Value]] = [[k.zeros(F32, lanes)] * 4 for _ in rows]
                for v in range(0, d, lanes):
                    query = [row.load(v, lanes) for row in q]
                    for j in range(4):
                        k_vector = load_page(k, keys, (key + j) * d + v, self.variant.page_dtype, lanes)
                        for i in range(len(rows)):
                            acc[i][j] = k.fma(query[i], k_vector, acc[i][j])
                at = (page - start) * a.C + key
                for i in range(len(rows)):
                    score = k.sum4(acc[i]) * self.scale
                    if self.variant.softcap:  # cap * tanh(s / cap), tanh(x) = 1 - 2 / (exp(2 x) + 1)
                        cap = k.splat(a.softcap[0], 4)
                        score = cap * (k.like(score, 1.0) - k.like(score, 2.0) / (k.exp(score * 2.0 / cap) + 1.0))
                    self.scores.store(at + i * SPLIT_KEYS, score)

    def _softmax(self, i: int, bounds: tuple[Value, Value], low: Value, high: Value) -> tuple[Value, Value]:
        """Scores of row i → exp(score - maximum), 0 where not visible; returns the split's maximum and sum."""
        k, lanes = self.k, self.k.lanes
        iota = k.const(ir.VectorType(I32, lanes), list(range(lanes)))
        low, high = low.to(I32), high.to(I32)

        def visible(key: Value) -> Value:
            position = iota + key.to(I32)
            return (position >= low) & (position < high)

        best = k.var(k.const(ir.VectorType(F32, lanes), FIRST_MAXIMUM))
        with k.range(*bounds, lanes) as key:
            score = self.scores.load(key + i * SPLIT_KEYS, lanes)
            best.v = k.max(best.v, k.select(visible(key), score, best.v))
        maximum = k.max_lanes(best.v)
        total: Var = k.var(k.zeros(F32, lanes))
        with k.range(*bounds, lanes) as key:
            score = self.scores.load(key + i * SPLIT_KEYS, lanes)
            weight = k.select(visible(key), k.exp(score - maximum), k.zeros(F32, lanes))
            self.scores.store(key + i * SPLIT_KEYS, weight)
            total.v = total.v + weight
        return maximum, k.sum_lanes(total.v)

    def _values(
        self, count: int, at: Value, factors: list[tuple[Value, Value]], start: Value, first_page: Value,
        end_page: Value, low: Value, high: Value,
    ) -> None:  # fmt: skip
        """Weighted sum of V over positions low … high - 1, which all have been written; other slots may hold NaN."""
        k, a, d, lanes = self.k, self.a, self.variant.head_dim, self.k.lanes
        vectors = 8 if k.registers >= 32 else 4
        for v0 in range(0, d, vectors * lanes):
            columns = range(v0, min(v0 + vectors * lanes, d), lanes)
            acc = [[k.var(k.zeros(F32, lanes)) for _ in columns] for _ in range(count)]
            with k.range(first_page, end_page) as page:
                values = page_block(k, a, self.table[page].to(I64), 1, self.item.head, d)
                begin, end = k.max(low - page * a.C, 0), k.min(high - page * a.C, a.C)
                with k.range(begin, end) as key:
                    local = (page - start) * a.C + key
                    weights = [k.splat(self.scores[local + i * SPLIT_KEYS], lanes) for i in range(count)]
                    for j, v in enumerate(columns):
                        value = load_page(k, values, key * d + v, self.variant.page_dtype, lanes)
                        for i in range(count):
                            acc[i][j].v = k.fma(weights[i], value, acc[i][j].v)
            for i in range(count):
                for j, v in enumerate(columns):
                    self.state.merge_acc(k, (at + i) * d + v, acc[i][j].v, *factors[i])

    def rows(self, split: Value, first: Value, end: Value, base: Value) -> None:
        """All rows first … end - 1, BLOCK_ROWS at a time."""
        k = self.k
        whole = first + (end - first) // BLOCK_ROWS * BLOCK_ROWS
        with k.range(first, whole, BLOCK_ROWS) as row:
            self.run(split, row, base, BLOCK_ROWS)
        for left in range(1, BLOCK_ROWS):
            with k.when((end - whole).eq(left)):
                self.run(split, whole, base, left)


def attend(k: Emitter, a: Frame, number: Value, variant: Variant) -> None:
    """One (item, head), or one split of it.

    With `max_splits` = 0 the task does all splits and writes the result, later items (longer, for a prefill) first.
    Else task number = (item, head, split), and the split's state goes to `partial`, as if it were the only one.
    """
    shared = a.max_splits > 0
    pair = k.select(shared, number // k.max(a.max_splits, 1), number)
    backwards = a.num_items - 1 - pair // a.Hkv
    item = Item(k, a, k.select(shared, pair // a.Hkv, backwards), pair % a.Hkv)
    begin = k.select(shared, item.first_split + number % k.max(a.max_splits, 1), item.first_split)
    stop = k.select(shared, k.min(begin + 1, item.end_split), item.end_split)
    state = State(k, variant.head_dim)
    attention = SplitAttention(k, a, variant, item, state)
    with k.range(0, item.rows, GROUP_ROWS) as base:
        end = k.min(base + GROUP_ROWS, item.rows)
        state.clear(k, a, variant, item, base, end - base, shared)
        with k.range(begin, stop) as split:
            attention.rows(split, base, end, base)
        with k.when_else(shared) as (partial, complete):
            with partial:
                target = a.partial + number * a.width
                with k.range(0, item.rows) as i:
                    target[i], target[i + item.rows] = state.maximum[i], state.total[i]
                with k.range(0, item.rows * variant.head_dim, k.lanes) as i:
                    target.store(i + item.rows * 2, state.acc.load(i, k.lanes))
            with complete:
                write_out(k, a, variant, item, state, base, end - base)


def merge_splits(k: Emitter, a: Frame, pair: Value, variant: Variant) -> None:
    """Merge the splits of one (item, head) in order and write the result."""
    item = Item(k, a, pair // a.Hkv, pair % a.Hkv)
    state, zero, d = State(k, variant.head_dim), k.i64(0), variant.head_dim
    state.clear(k, a, variant, item, zero, item.rows, k.const(I1, 0))
    with k.range(0, item.end_split - item.first_split) as split:
        source = a.partial + (pair * a.max_splits + split) * a.width
        with k.range(0, item.rows) as i:
            factors = state.merge_sums(k, i, source[i], source[i + item.rows])
            for v in range(0, d, k.lanes):
                state.merge_acc(k, i * d + v, source.load((i + item.rows * 2) + i * (d - 1) + v, k.lanes), *factors)
    write_out(k, a, variant, item, state, zero, item.rows)


def body(k: Emitter, a: Frame, variant: Variant) -> None:
    """Check what the buffers' sizes do not say, write the rows, attend."""
    a.require((a.Hq % a.Hkv).eq(0), "argument q: its heads are not a multiple of the KV heads")
    a.require((a.C % 16).eq(0) & (a.C <= SPLIT_KEYS), f"argument pages: page size is not 16, 32 … {SPLIT_KEYS}")
    a.require(a.S1.eq(a.S + 1), "argument q_start: expected one entry more than kv_len")
    layer, num_items, num_single = (x.to(I64) for x in (a.layer[0], a.counts[1], a.counts[0]))
    a.require((layer >= 0) & (layer < a.L), "argument layer is out of range")
    good = (num_single >= 0) & (num_single <= num_items) & (num_items <= a.N)
    a.require(good, "argument counts does not fit items")
    valid, most_splits = k.var(k.const(I1, 1)), k.var(k.i64(1))
    with k.range(0, num_items) as i:
        seq, first, rows = (a.items[i * 5 + column].to(I64) for column in range(3))
        inside = (seq >= 0) & (seq < a.S) & (first >= 0) & (rows >= 0) & (first + rows <= a.T)
        page, pages = (a.items[i * 5 + column].to(I64) for column in (3, 4))
        valid.v = valid.v & inside & (page >= 0) & (pages >= 0) & (page + pages <= a.B)
        with k.when(valid.v):
            item = Item(k, a, i, k.i64(0))
            most_splits.v = k.max(most_splits.v, item.end_split - item.first_split)
    a.require(valid.v, "argument items names rows, a sequence or pages that are not there")

    a.parallel((a.T + (WRITE_ROWS - 1)) // WRITE_ROWS, lambda k, a, i: write_rows(k, a, i, variant))
    pairs, splits, group = num_items * a.Hkv, most_splits.v, a.Hq // a.Hkv
    share = num_single.eq(num_items) & (pairs < SPLIT_TASKS) & (splits > 1) & (pairs * splits <= a.slots)
    share = share & (group <= GROUP_ROWS) & (group * (variant.head_dim + 2) <= a.width)
    extra = {"num_items": num_items, "max_splits": k.select(share, splits, k.i64(0))}
    tasks = k.select(share, pairs * splits, pairs)
    a.parallel(tasks, lambda k, a, i: attend(k, a, i, variant), **extra)
    with k.when(share):
        a.parallel(pairs, lambda k, a, i: merge_splits(k, a, i, variant), **extra)


def copy_pages_body(k: Emitter, a: Frame, inner: Sequence[str], itemsize: int) -> None:
    """One task copies one page of one layer, for the first `count` of the pairs; `inner` names a page's dimensions."""
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
