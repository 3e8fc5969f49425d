"""One split of the keys for a few rows: scores, softmax within the split, weighted sum of V, merged into the rows' state.

A row's softmax is taken split by split: SPLIT_KEYS keys at absolute positions, each with a maximum, a sum and a weighted sum
of its own, merged in order. That is what lets threads share a long context, and it fixes the order of every sum, so a row's
result is the same bits in any batch, any chunk of a prefill, on any number of threads.
(Online softmax: Milakov & Gimelshein 2018; splits over keys: flash-decoding, Dao et al. 2023.)
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F16, F32, I8, I16, I32, I64, Emitter, Ptr, Value, Var, element_bytes

SPLIT_KEYS = 256  # 128 KiB of K and V a head at D = 64: stays in L2 while the rows of an item pass
GROUP_ROWS = 48  # (token, head) rows that are worked on together
BLOCK_ROWS = 6  # of them in registers, with two sums of a vector of keys each, or with 4 vectors of V
PREFETCH_MOST_ROWS = 16  # items of more rows find K in the L2 cache: there the prefetches would only cost
LINE_BYTES = 64
FIRST_MAXIMUM = -1e30  # finite, so that two empty maxima compare as exp(0)


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


def page_values(k: Emitter, x: Value, dtype: str) -> Value:
    """float32 as `pages.to_page_dtype` stores it: nearest even; int8 clipped to ±127."""
    if dtype == "int8":
        return k.max(k.min(k.round_even(x), 127.0), -127.0).to(I8)
    if dtype == "float16":
        return x.to(F16).bits(ir.VectorType(I16, x.type.count))
    return x if dtype == "float32" else k.f32_to_bf16(x)


def page_block(k: Emitter, a: Frame, page: Value, which: int, head: Value, d: int) -> Ptr:
    """K (which = 0), [D, C], or V (1), [C, D], of one head of one page. A page id outside the pool means the null page."""
    page = k.select((page >= 0) & (page < a.P), page, k.i64(0))
    return a.pages_out + (((a.layer[0].to(I64) * a.P + page) * 2 + which) * a.Hkv + head) * a.C * d


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
        """A lane is a key, so no sum crosses lanes: each is over d in two halves, whatever the rows beside it."""
        k, a, d, lanes = self.k, self.a, self.variant.head_dim, self.k.lanes
        group, head, half, unroll = self.item.group, self.item.head, d // 2, 4
        q = [a.q + ((self.item.first_row + row // group) * a.Hq + head * group + row % group) * d for row in rows]
        with k.range(first_page, end_page) as page:
            keys = page_block(k, a, self.table[page].to(I64), 0, head, d)
            values = page_block(k, a, self.table[page].to(I64), 1, head, d)
            next_keys = page_block(k, a, self.table[k.min(page + 1, end_page - 1)].to(I64), 0, head, d)
            with k.range(0, a.C, lanes) as key:
                sums = [[k.var(k.zeros(F32, lanes)) for _ in (0, 1)] for _ in rows]
                with k.range(0, half, unroll) as i:
                    for part in (0, 1):
                        for step in range(unroll):
                            at = i + (part * half + step)
                            k_vector = load_page(k, keys, at * a.C + key, self.variant.page_dtype, lanes)
                            for row, both in zip(q, sums, strict=True):
                                both[part].v = k.fma(k.splat(row[at], lanes), k_vector, both[part].v)
                    with k.when((self.item.rows <= PREFETCH_MOST_ROWS) & key.eq(0)):
                        bytes_ = 2 * unroll * a.C * element_bytes(keys.element)  # this turn's share of a page
                        for next_block in (next_keys, values):
                            block = next_block.as_(I8) + i // unroll * bytes_
                            with k.range(0, bytes_, LINE_BYTES) as line:
                                (block + line).prefetch(0)
                at = (page - start) * a.C + key
                for i, (first, second) in enumerate(sums):
                    score = (first.v + second.v) * self.scale
                    if self.variant.softcap:  # cap * tanh(s / cap), tanh(x) = 1 - 2 / (exp(2 x) + 1)
                        cap = k.splat(a.softcap[0], lanes)
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
        begin = k.var(whole)
        for count in (3, 2, 1):  # five rows are 3 + 2
            with k.when(end - begin.v >= count):
                self.run(split, begin.v, base, count)
                begin.v = begin.v + count
