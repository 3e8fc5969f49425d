"""Quantised matmul on tiled rows (see `tiles`): integer dot products of activations cut into 8-bit digits.

In blocks of 32, activations become whole numbers times a scale: of 23 bits for `exact`, three digits in base 256, and of one
or two digits for `fast` (one is llama.cpp's Q8_1). Four weights of 16 rows times four activations are one instruction
(vpdpbusd of AVX-512 VNNI). Shifts put the digits' sums together, so a run of weights with one scale is an exact integer per
row and takes one conversion and one or two multiply-adds. Three digits err by at most 2^-22 of a block's largest activation, on
the whole less than a float32 sum. No path depends on M or on the number of threads: a row of the result has the same bits in
any batch.
"""

from __future__ import annotations

import functools

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I32, I64, Emitter, Ptr, Value, Var
from pallas_kernels.quant_matmul.cpu_activations import BLOCK, Activations
from pallas_kernels.quant_matmul.cpu_dot import by_pairs, dot, pair_sums, word_sums
from pallas_kernels.quant_matmul.cpu_tasks import task_rows
from pallas_kernels.quant_matmul.cpu_tile_kinds import KINDS, View
from pallas_kernels.quant_matmul.formats import BlockFormat
from pallas_kernels.quant_matmul.tiles import ROWS
from pallas_kernels.quant_matmul.tiles import TILE_GROUP as GROUP

MAX_TASK_ROWS = 1024  # for M = 1: long runs of memory
TASK_BYTES = 384 << 10  # of weights, for M > 1: they stay in the L2 cache beside a group's activations
FETCH_AHEAD = 4096  # bytes: some 300 ns of one core
LINE = 64  # bytes of a cache line
PAIR_SUMS = 12  # of 16 vector registers
Scales = tuple[list[Value], list[Value]]


class _Tile:
    """Results of some rows of a group of activations for the weight rows of a tile."""

    def __init__(self, k: Emitter, a: Frame, x: Activations, fmt: BlockFormat) -> None:
        self.k, self.a, self.x, self.kind = k, a, x, KINDS[fmt.kind]
        self.fmt, self.rows = fmt, min(ROWS, k.lanes)
        self.many = fmt.elements // BLOCK  # blocks of activations
        self.each = 2 if self.kind.halves else 1  # scales of a run
        self.by_pairs = by_pairs(k, self.rows)
        # A block's scales are computed at once, and stay in memory while a loop goes through its parts.
        size = self.many * self.each * ROWS
        self.kept = [k.scratch(F32, size) for _ in range(2)] if self.many > 1 else []

    def multiply(self, tile: Value, group: Value, start: Value, count: int) -> None:
        """Computes the results of `count` rows from `start` of a group.

        Few rows are multiplied with all vectors of a tile together: memory is read once and in order. For more there are too few
        registers, and reading takes a small part of the time.
        """
        vectors = ROWS // self.rows
        together = 1 if count > 2 else min(vectors, PAIR_SUMS // self.x.digits) if self.by_pairs else vectors
        together = 1 << together.bit_length() - 1
        with self.k.range(0, ROWS, self.rows * together) as first:
            self._multiply(tile, [first + i * self.rows for i in range(together)], group, start, count)

    def _multiply(self, tile: Value, firsts: list[Value], group: Value, start: Value, count: int) -> None:
        k, a, kind, rows, size = self.k, self.a, self.kind, self.rows, self.a.block_bytes
        weights = a.blocks + (a.layer[0].to(I64) * (a.N // ROWS) + tile) * (size * a.B)
        acc = [[k.var(k.zeros(F32, rows)) for _ in range(count)] for _ in firsts]
        with k.range(0, a.B) as b:
            views = [View(k, weights + b * size, first, rows) for first in firsts]
            scales = [kind.scales(view) for view in views]
            if not self.kept:
                self._fetch(weights + b * size, k.i64(0))
                self._run(acc, group, b, start, scales, views, k.i64(0), 0)
            else:
                self._keep(scales)
                with k.range(0, kind.parts) as part:
                    for run in range(kind.runs):
                        number = part * kind.runs + run
                        self._fetch(weights + b * size, number)
                        own = [self._kept(scales[v], v, number) for v in range(len(views))]
                        self._run(acc, group, b * self.many + number, start, own, views, part, run)
        for first, sums in zip(firsts, acc, strict=True):
            for i, sum_ in enumerate(sums):
                a.out.store((group * GROUP + start + i) * a.N + tile * ROWS + first, sum_.v)

    def _fetch(self, block: Ptr, run: Value) -> None:
        """Asks for a run's share of the bytes that come a while after a block, which may be past the last one.

        Machines guess poorly what comes next: a block's parts are not read in the order of memory, and guesses end with a page.
        """
        lines = -(-self.fmt.bytes * ROWS // LINE // self.many)
        start = block + (run * (lines * LINE) + FETCH_AHEAD)
        for i in range(lines):
            start.prefetch(i * LINE)

    def _keep(self, scales: list[Scales]) -> None:
        for v, pair in enumerate(scales):
            for place, values in zip(self.kept, pair, strict=True):
                for i, value in enumerate(values):
                    place.store((v * self.many * self.each + i) * self.rows, value)

    def _kept(self, scales: Scales, vector: int, number: Value) -> Scales:
        """Returns what was kept of a run's scales and minima."""
        first = (number + vector * self.many) * self.each

        def load(place: Ptr) -> list[Value]:
            return [place.load((first + i) * self.rows, self.rows) for i in range(self.each)]

        return load(self.kept[0]), load(self.kept[1]) if scales[1] else []

    def _run(
        self,
        acc: list[list[Var]],
        group: Value,
        number: Value,
        start: Value,
        scales: list[Scales],
        views: list[View],
        part: Value,
        run: int,
    ) -> None:
        """Adds the products of a run of 32 weights to `acc` [vector][row of activations]."""
        k, x, kind, rows = self.k, self.x, self.kind, self.rows
        digits, xd, sums = x.at(group, number)
        digits, xd, sums = digits + start * x.bytes, xd + start, sums + start * 2
        count = len(acc[0])
        biases = [
            [k.splat(sums.as_(I32)[slot * 2 + j], rows) for j in range(2)] if kind.bias else [] for slot in range(count)
        ]
        products = (self._in_pairs if self.by_pairs else self._chained)(digits, biases, views, part, run)
        for of_vector, (scale, minima), vector_sums in zip(products, scales, acc, strict=True):
            if minima and kind.bias:
                bias = k.like(scale[0], float(kind.bias))
                minima = [k.fma(s, bias, least) for s, least in zip(scale, minima, strict=True)]
            for slot, (product, sum_) in enumerate(zip(of_vector, vector_sums, strict=True)):
                if kind.halves:
                    both = k.fma(product[1], scale[1], product[0] * scale[0])
                    sum_.v = k.fma(both, k.splat(xd[slot], rows), sum_.v)
                else:
                    sum_.v = k.fma(product[0], scale[0] * xd[slot], sum_.v)
                for i, least in enumerate(minima):
                    sum_.v = k.fma(least, k.splat(sums[slot * 2 + i + bool(kind.bias)], rows), sum_.v)

    def _chained(
        self, digits: Ptr, biases: list[list[Value]], views: list[View], part: Value, run: int
    ) -> list[list[list[Value]]]:
        """Returns a run's products [vector][row of activations][scale], where an instruction adds them to 32-bit sums."""
        k, x, kind = self.k, self.x, self.kind
        zeros = k.zeros(I32, self.rows)

        def sums(columns: list[Value], at: Ptr, bias: list[Value], half: int) -> Value:
            each = len(columns)

            def digit(total: Value, number: int) -> Value:
                return dot(k, total, columns, at + (number * BLOCK + 4 * half * each), kind.most)

            if x.split:
                return self._split(digit(bias[1], 0), digit(digit(zeros, 1) << 8, 2) + bias[0])
            alone = x.digits == 1 and bool(bias)
            whole = digit(bias[half] if alone else zeros, 0)
            for d in range(1, x.digits):
                whole = digit(whole << 8, d)
            return (whole + bias[half] if bias and not alone else whole).to(F32)

        result = []
        for view in views:
            columns = list(kind.weights(view, part, run))
            each = len(columns) // self.each
            halves = [columns[i * each : (i + 1) * each] for i in range(self.each)]
            result.append(
                [
                    [sums(half, digits + slot * x.bytes, bias, i) for i, half in enumerate(halves)]
                    for slot, bias in enumerate(biases)
                ]
            )
        return result

    def _in_pairs(
        self, digits: Ptr, biases: list[list[Value]], views: list[View], part: Value, run: int
    ) -> list[list[list[Value]]]:
        """Returns the same, where products of bytes are 16-bit sums of pairs: column by column, for some rows of activations."""
        k, x, kind = self.k, self.x, self.kind
        passes = -(-len(biases) // max(1, PAIR_SUMS // (len(views) * x.digits)))
        each = -(-len(biases) // passes)
        result: list[list[list[Value]]] = [[] for _ in views]
        for first in range(0, len(biases), each):
            slots = range(first, min(first + each, len(biases)))
            places = [digits + (slot * x.bytes + d * x.digit_bytes) for slot in slots for d in range(x.digits)]
            columns = map(list, zip(*[kind.weights(view, part, run) for view in views], strict=True))
            count = 8 // self.each
            sums = [
                word_sums(k, columns, count, i * count, places, views)
                if x.by_words
                else pair_sums(k, columns, count, i * count, places, kind.most, views)
                for i in range(self.each)
            ]
            for v, of_vector in enumerate(result):
                for i, slot in enumerate(slots):
                    own = [s[v][i * x.digits : (i + 1) * x.digits] for s in sums]
                    of_vector.append([self._put_together(parts, biases[slot], half) for half, parts in enumerate(own)])
        return result

    def _put_together(self, parts: list[Value], bias: list[Value], half: int) -> Value:
        if self.x.split:
            lower = functools.reduce(lambda high, low: (high << self.x.bits) + low, parts[1:])
            return self._split(parts[0] + bias[1], lower + bias[0])
        whole = functools.reduce(lambda high, low: (high << self.x.bits) + low, parts)
        return (whole + bias[half] if bias else whole).to(F32)

    def _split(self, high: Value, low: Value) -> Value:
        """Returns the sum of leading digits and that of the rest together, which does not fit 32 bits."""
        k = self.k
        return k.fma(high.to(F32), k.const(ir.VectorType(F32, self.rows), float(self.x.leading)), low.to(F32))


def body(k: Emitter, a: Frame, fmt: BlockFormat, digits: int, gated: bool, normed: bool) -> None:
    """Checks what the buffers' sizes do not say; cuts the activations into digits; then does a few tiles per task."""
    a.require((a.G * BLOCK).eq(a.K), f"result xd: expected K / {BLOCK} blocks")
    a.require((a.A * GROUP) >= a.M, f"result xd: expected groups of {GROUP} for all M rows")
    a.require(a.S.eq(k.min(a.M, GROUP)), f"result xd: expected places for the rows of a group, at most {GROUP}")
    a.require((a.N % ROWS).eq(0), f"argument blocks: rows are not a multiple of {ROWS}")
    blocks = a.K // fmt.elements
    a.require((blocks * fmt.elements).eq(a.K), f"argument x: K is not a multiple of {fmt.elements} ({fmt.kind})")
    a.require((blocks * fmt.bytes).eq(a.R), f"argument blocks: rows do not hold K weights ({fmt.kind})")
    layer = a.layer[0].to(I64)
    a.require((layer >= 0) & (layer < a.L), "argument layer is out of range")

    if normed:
        norm_layer = a.norm_layer[0].to(I64)
        a.require((norm_layer >= 0) & (norm_layer < a.H), "argument norm_layer is out of range")

    def rounding(k: Emitter, a: Frame, number: Value) -> None:
        Activations(k, a, fmt.kind, digits, gated, normed).round_row(number)

    def task(k: Emitter, a: Frame, number: Value) -> None:
        tiles = _Tile(k, a, Activations(k, a, fmt.kind, digits, gated, normed), fmt)
        first = number * a.task_tiles
        last = k.min(first + a.task_tiles, a.N // ROWS)
        whole = a.M // GROUP
        with k.range(0, whole) as group, k.range(first, last) as tile:
            tiles.multiply(tile, group, k.i64(0), GROUP)
        left = a.M % GROUP
        for count in (4, 2, 1):  # rows past the whole groups, by the bits of their number: 7 is 4 + 2 + 1
            with k.when((left & count).ne(0)), k.range(first, last) as tile:
                tiles.multiply(tile, whole, left & -2 * count, count)

    a.parallel(a.M, rounding)
    in_cache = k.max(k.i64(TASK_BYTES) // a.R // ROWS * ROWS, k.i64(ROWS))
    rows = task_rows(k, a, ROWS, k.select(a.M.eq(1), k.i64(MAX_TASK_ROWS), in_cache))
    tiles = rows // ROWS
    size = k.i64(fmt.bytes * ROWS)
    a.parallel((a.N // ROWS + tiles - 1) // tiles, task, task_tiles=tiles, block_bytes=size, B=blocks)
