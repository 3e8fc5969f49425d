"""Attends from a few rows to one split of the keys: scores, softmax, weighted sum of V, merged into the rows' state.

A row's softmax is computed split by split, SPLIT_KEYS keys at absolute positions, each with its own maximum, sum and weighted
sum that grow page by page; splits are merged in order. So threads can share a long context, and the order of
every sum is fixed: a row's result has the same bits in any batch, any chunk of a prefill, on any number of threads.
(Online softmax: Milakov & Gimelshein 2018; splits over keys: flash-decoding, Dao et al. 2023.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F16, F32, I8, I16, I32, I64, Emitter, Ptr, Value
from pallas_kernels.paged_attention.page_width import page_width

SPLIT_KEYS = 256  # 128 KiB of K and V per head at D = 64: stays in L2 while the rows of an item pass
GROUP_ROWS = 48  # (token, head) rows that are worked on together
BLOCK_ROWS = 6  # of them in registers, each with two sums of a vector of keys, or with 4 vectors of V
FIRST_MAXIMUM = -1e30  # finite, so that two empty maxima compare as exp(0)


@dataclass(frozen=True)
class Variant:
    """Properties that are compiled in."""

    head_dim: int
    page_dtype: str
    softcap: bool
    sinks: bool
    scales: bool

    def lanes(self, k: Emitter) -> int:
        """Returns the lanes of vectors along D, which they fill."""
        return math.gcd(self.head_dim, k.lanes)

    @property
    def own_scales(self) -> bool:
        """Whether each token and head has a scale in its page: those of a block lie behind all of its numbers."""
        return self.page_dtype == "uint8"

    @property
    def name(self) -> str:
        flags = "".join(f"_{flag}" for flag in ("softcap", "sinks", "scales") if getattr(self, flag))
        return f"paged_attention_{self.page_dtype}_d{self.head_dim}{flags}"


def split_pages(k: Emitter, a: Frame) -> Value:
    """Returns the pages per split: as many as make SPLIT_KEYS keys, at least one."""
    return k.max(k.i64(SPLIT_KEYS) // a.C, 1)


def load_page(k: Emitter, pages: Ptr, index: Value | int, dtype: str, count: int) -> Value:
    """Loads `count` page elements as float32, before the multiplication by a scale."""
    raw = pages.load(index, count)
    if dtype == "float32":
        return raw
    if dtype in ("int8", "uint8"):
        return raw.to(I32).to(F32)
    if dtype == "float16":
        return raw.bits(ir.VectorType(F16, count)).to(F32)
    return k.bf16_to_f32(raw)


def page_values(k: Emitter, x: Value, dtype: str) -> Value:
    """Rounds float32 as `pages.to_page_dtype` stores it: to nearest, ties to even; int8 clipped to ±127."""
    if dtype in ("int8", "uint8"):
        return k.max(k.min(k.round_even(x), 127.0), -127.0).to(I8)
    if dtype == "float16":
        return x.to(F16).bits(ir.VectorType(I16, x.type.count))
    return x if dtype == "float32" else k.f32_to_bf16(x)


def page_block(k: Emitter, a: Frame, page: Value, which: int, head: Value, variant: Variant) -> Ptr:
    """Returns K (which = 0), [D, C], or V (1), [C, D], of one head of one page. A page id outside the pool means the null
    page."""
    page = k.select((page >= 0) & (page < a.P), page, k.i64(0))
    width = page_width(variant.head_dim, variant.page_dtype)
    return a.pages_out + (((a.layer[0].to(I64) * a.P + page) * 2 + which) * a.Hkv + head) * a.C * width


def own_scales(a: Frame, block: Ptr, variant: Variant) -> Ptr:
    """Returns the scales [C] of a block of `page_block`."""
    return (block + a.C * variant.head_dim).as_(F32)


class Item:
    """One work item for `heads` KV heads from `head` on: where its rows and keys are. `rows` are those of one KV head."""

    def __init__(self, k: Emitter, a: Frame, item: Value, head: Value, heads: Value | None = None) -> None:
        columns = [a.items[item * 5 + i].to(I64) for i in range(5)]
        self.seq, self.first_row, rows, first_page, page_count = columns
        self.head, self.group = head, a.Hq // a.Hkv
        self.heads = k.i64(1) if heads is None else heads
        self.rows = rows * self.group
        self.shift = (a.kv_len[self.seq] - a.q_start[self.seq + 1]).to(I64)  # position of a row = row + shift
        self.window = k.max(a.window[0].to(I64), 1)
        first, last = self.first_row + self.shift, self.first_row + rows - 1 + self.shift
        self.first_page = k.max(first_page, k.max(first - self.window + 1, 0) // a.C)
        self.end_page = k.min(first_page + page_count, k.max(last, 0) // a.C + 1)
        self.first_split = self.first_page // split_pages(k, a)
        self.end_split = (self.end_page + split_pages(k, a) - 1) // split_pages(k, a)


class State:
    """Running maximum, sum and weighted sum of up to GROUP_ROWS rows, on the stack (or read from partial results).

    The rows of the first head come first, `item.group` for each head.
    """

    def __init__(self, k: Emitter, variant: Variant) -> None:
        self.d, self.lanes = variant.head_dim, variant.lanes(k)
        self.maximum, self.total = k.scratch(F32, GROUP_ROWS), k.scratch(F32, GROUP_ROWS)
        self.acc = k.scratch(F32, GROUP_ROWS * self.d)

    def clear(
        self, k: Emitter, a: Frame, variant: Variant, item: Item, first: Value, count: Value, partial: Value
    ) -> None:
        """Starts without a key; with sinks (unless the state is merged later), with one key of score `sink` without value."""
        with k.range(0, item.heads) as head, k.range(0, count) as i:
            at = head * item.group + i
            self.maximum[at], self.total[at] = FIRST_MAXIMUM, 0.0
            if variant.sinks:
                with k.when(partial ^ 1):
                    sink = a.sinks[(item.head + head) * item.group + (first + i) % item.group]
                    self.maximum[at], self.total[at] = sink, 1.0
            for v in range(0, self.d, self.lanes):
                self.acc.store(at * self.d + v, k.zeros(F32, self.lanes))

    def merge_sums(self, k: Emitter, i: Value, maximum: Value, total: Value) -> tuple[Value, Value]:
        """Takes in a split's maximum and sum; returns the factors of the old and of the split's weighted sum."""
        new = k.max(self.maximum[i], maximum)
        old_factor, factor = k.exp(self.maximum[i] - new), k.exp(maximum - new)
        self.total[i] = k.fma(total, factor, self.total[i] * old_factor)
        self.maximum[i] = new
        return old_factor, factor

    def merge_acc(self, k: Emitter, at: Value, split: Value, old_factor: Value, factor: Value) -> None:
        self.acc.store(at, k.fma(split, factor, self.acc.load(at, self.lanes) * old_factor))


class SplitAttention:
    """One split for a few (1 … BLOCK_ROWS) rows of each head, with a softmax of its own, page by page, merged into the state.

    It reads memory in the order in which it lies, page by page with the keys and values of all heads: the hardware then
    fetches ahead, and a page comes about twice as fast as head by head.
    """

    def __init__(self, k: Emitter, a: Frame, variant: Variant, item: Item, state: State) -> None:
        self.k, self.a, self.variant, self.item, self.state = k, a, variant, item, state
        d = variant.head_dim
        # All are by (head, row). Of the split: maximum, sum lane by lane, weighted sum. Of the page: scores, then
        # exp(score - maximum), and the factor for the result of the pages before.
        self.maximum, self.total = k.scratch(F32, GROUP_ROWS), k.scratch(F32, GROUP_ROWS * k.lanes)
        self.acc = k.scratch(F32, GROUP_ROWS * d)
        self.weights, self.factors = k.scratch(F32, GROUP_ROWS * SPLIT_KEYS), k.scratch(F32, GROUP_ROWS)
        self.table = a.block_tables + item.seq * a.B
        self.scale = a.scale[0] * a.k_scale[0] if variant.scales else a.scale[0]

    def run(self, split: Value, first: Value, base: Value, count: int) -> None:
        """Attends for rows first … first + count - 1 of each head of the item; their state is at first - base."""
        k, a, item, d, lanes = self.k, self.a, self.item, self.variant.head_dim, self.k.lanes
        width = self.variant.lanes(k)
        pages = split_pages(k, a)
        start = split * pages
        rows = [first + i for i in range(count)]
        positions = [item.first_row + row // item.group + item.shift for row in rows]
        oldest = k.max(positions[0] - item.window + 1, 0)
        first_page = k.max(k.max(item.first_page, start), oldest // a.C)
        end_page = k.min(k.min(item.end_page, start + pages), positions[-1] // a.C + 1)
        with k.when(first_page < end_page):
            with k.range(0, item.heads * count) as i:
                self.maximum[i] = FIRST_MAXIMUM
                self.total.store(i * lanes, k.zeros(F32, lanes))
                for v in range(0, d, width):
                    self.acc.store(i * d + v, k.zeros(F32, width))
            with k.range(first_page, end_page) as page:
                self._page(page, rows, positions)
            with k.range(0, item.heads) as head, k.range(0, count) as i:
                here, there = head * count + i, head * item.group + (first - base) + i
                total = k.sum_lanes(self.total.load(here * lanes, lanes))
                factors = self.state.merge_sums(k, there, self.maximum[here], total)
                for v in range(0, d, width):
                    self.state.merge_acc(k, there * d + v, self.acc.load(here * d + v, width), *factors)

    def _page(self, page: Value, rows: list[Value], positions: list[Value]) -> None:
        """Takes one page into the split's sums. A row that sees none of its keys stays as it is, to the bit."""
        k, a, item, variant = self.k, self.a, self.item, self.variant
        number, start = self.table[page].to(I64), page * a.C
        seen = [(k.max(p - item.window + 1, 0) - start, p + 1 - start) for p in positions]  # of the page's keys
        with k.range(0, item.heads) as head:
            self._keys(page_block(k, a, number, 0, item.head + head, variant), head, rows, seen)
        # One of the rows sees each of these keys, and all have been written; other slots may hold NaN.
        begin, end = k.max(seen[0][0], 0), k.min(seen[-1][1], a.C)
        with k.range(0, item.heads) as head:
            values = page_block(k, a, number, 1, item.head + head, variant)
            self._values(values, head * len(rows), len(rows), begin, end)

    def _keys(self, keys: Ptr, head: Value, rows: list[Value], seen: list[tuple[Value, Value]]) -> None:
        """Computes the weights of one head's keys and updates the rows' maxima and sums."""
        k, a, lanes = self.k, self.a, self.k.lanes
        iota = k.const(ir.VectorType(I32, lanes), list(range(lanes)))
        bounds = [(low.to(I32), high.to(I32)) for low, high in seen]

        def visible(i: int, key: Value) -> Value:
            place = iota + key.to(I32)
            return (place >= bounds[i][0]) & (place < bounds[i][1])

        here = [head * len(rows) + i for i in range(len(rows))]
        weights = [self.weights + at * SPLIT_KEYS for at in here]
        best = [k.var(k.const(ir.VectorType(F32, lanes), FIRST_MAXIMUM)) for _ in rows]
        with k.range(0, a.C, lanes) as key:
            for i, score in enumerate(self._scores(keys, key, self.item.head + head, rows)):
                weights[i].store(key, score)
                best[i].v = k.max(best[i].v, k.select(visible(i, key), score, best[i].v))
        maxima, totals = [], []
        for i, at in enumerate(here):
            before, factor = self.maximum[at], k.var(k.const(F32, 1.0))
            maximum = k.max(before, k.max_lanes(best[i].v))
            with k.when(maximum > before):  # rare: an exp of one number costs as much as one of a vector
                factor.v = k.exp(before - maximum)
                self.maximum[at] = maximum
            self.factors[at] = factor.v
            maxima.append(maximum)
            totals.append(k.var(self.total.load(at * lanes, lanes) * factor.v))
        with k.range(0, a.C, lanes) as key:
            for i, maximum in enumerate(maxima):
                weight = k.exp(weights[i].load(key, lanes) - maximum)
                weight = k.select(visible(i, key), weight, k.zeros(F32, lanes))
                weights[i].store(key, weight)
                totals[i].v = totals[i].v + weight
        for at, total in zip(here, totals, strict=True):
            self.total.store(at * lanes, total.v)

    def _scores(self, keys: Ptr, key: Value, head: Value, rows: list[Value]) -> list[Value]:
        """Returns the scores of `lanes` keys with each row. A lane is a key, so no sum crosses lanes; each is over even and odd
        d."""
        k, a, d, lanes = self.k, self.a, self.variant.head_dim, self.k.lanes
        unroll = math.gcd(d, 8)
        group, first_row = self.item.group, self.item.first_row
        q = [a.q + ((first_row + row // group) * a.Hq + head * group + row % group) * d for row in rows]
        sums = [[k.var(k.zeros(F32, lanes)) for _ in (0, 1)] for _ in rows]
        with k.range(0, d, unroll) as i:
            for step in range(unroll):
                at = i + step
                k_vector = load_page(k, keys, at * a.C + key, self.variant.page_dtype, lanes)
                for row, both in zip(q, sums, strict=True):
                    both[step % 2].v = k.fma(k.splat(row[at], lanes), k_vector, both[step % 2].v)
        scale = self.scale
        if self.variant.own_scales:
            scale = own_scales(a, keys, self.variant).load(key, lanes) * scale
        scores = [(even.v + odd.v) * scale for even, odd in sums]
        if not self.variant.softcap:
            return scores
        cap = k.splat(a.softcap[0], lanes)  # cap * tanh(s / cap), tanh(x) = 1 - 2 / (exp(2 x) + 1)
        return [cap * (k.like(s, 1.0) - k.like(s, 2.0) / (k.exp(s * 2.0 / cap) + 1.0)) for s in scores]

    def _values(self, values: Ptr, first: Value, count: int, begin: Value, end: Value) -> None:
        """Adds the weighted sums of one head's values begin … end - 1 to those of the pages before."""
        k, d, lanes = self.k, self.variant.head_dim, self.variant.lanes(self.k)
        vectors = 8 if k.registers >= 32 else 4
        here = [first + i for i in range(count)]
        if self.variant.own_scales:
            scales = own_scales(self.a, values, self.variant)
            with k.range(0, self.a.C, k.lanes) as key:
                factors = scales.load(key, k.lanes)
                for at in here:
                    place = self.weights + at * SPLIT_KEYS
                    place.store(key, place.load(key, k.lanes) * factors)
        for v0 in range(0, d, vectors * lanes):
            columns = range(v0, min(v0 + vectors * lanes, d), lanes)
            acc = [[k.var(self.acc.load(at * d + v, lanes) * self.factors[at]) for v in columns] for at in here]
            with k.range(begin, end) as key:
                weights = [k.splat(self.weights[at * SPLIT_KEYS + key], lanes) for at in here]
                for j, v in enumerate(columns):
                    value = load_page(k, values, key * d + v, self.variant.page_dtype, lanes)
                    for weight, sums in zip(weights, acc, strict=True):
                        sums[j].v = k.fma(weight, value, sums[j].v)
            for at, sums in zip(here, acc, strict=True):
                for v, sum_ in zip(columns, sums, strict=True):
                    self.acc.store(at * d + v, sum_.v)

    def rows(self, split: Value, first: Value, end: Value, base: Value) -> None:
        """Attends for all rows first … end - 1, BLOCK_ROWS at a time."""
        k = self.k
        whole = first + (end - first) // BLOCK_ROWS * BLOCK_ROWS
        with k.range(first, whole, BLOCK_ROWS) as row:
            self.run(split, row, base, BLOCK_ROWS)
        begin = k.var(whole)
        for count in (3, 2, 1):  # five rows are 3 + 2
            with k.when(end - begin.v >= count):
                self.run(split, begin.v, base, count)
                begin.v = begin.v + count
