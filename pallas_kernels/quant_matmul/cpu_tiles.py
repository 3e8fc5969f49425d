"""Quantised matmul on tiled rows (see `tiles`): integer dot products of activations cut into 8-bit digits.

In blocks of 32, activations become whole numbers times a scale: of 23 bits for `exact`, three digits in base 256, and of one
or two digits for `fast` (one is llama.cpp's Q8_1). Four weights of 16 rows times four activations are one instruction
(vpdpbusd of AVX-512 VNNI); AMX takes more than eight rows of activations at once. Shifts put the digits' sums together, so a run
of weights with one scale is an exact integer per row and takes one conversion and one or two multiply-adds. Three digits err by
at most 2^-22 of a block's largest activation, on the whole less than a float32 sum. No path depends on M or on the number of
threads: a row of the result has the same bits in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I32, I64, Emitter, Ptr, Value, Var
from pallas_kernels.quant_matmul.cpu_activations import BLOCK, Activations
from pallas_kernels.quant_matmul.cpu_amx import TileProducts, has_amx
from pallas_kernels.quant_matmul.cpu_dot import by_pairs, dot, pair_sums, word_sums
from pallas_kernels.quant_matmul.cpu_tasks import task_rows
from pallas_kernels.quant_matmul.cpu_tile_kinds import KINDS, View
from pallas_kernels.quant_matmul.formats import BlockFormat
from pallas_kernels.quant_matmul.tiles import ROWS, TOGETHER
from pallas_kernels.quant_matmul.tiles import TILE_GROUP as GROUP

MAX_TASK_ROWS = 1024  # for M = 1: long runs of memory
TASK_BYTES = 384 << 10  # of weights, for M > 1: they stay in the L2 cache beside a group's activations
FETCH_AHEAD = 4096  # bytes: some 300 ns of one core
LINE = 64  # bytes of a cache line
PAIR_SUMS = 12  # of 16 vector registers
AT_ONCE = 8  # rows whose sums by AMX are read together: with all of them registers run out
Scales = tuple[list[Value], list[Value]]


class _Tile:
    """Results of some rows of a group of activations for the weight rows of a tile."""

    def __init__(self, k: Emitter, a: Frame, x: Activations, fmt: BlockFormat) -> None:
        self.k, self.a, self.x, self.kind = k, a, x, KINDS[fmt.kind]
        self.fmt, self.rows = fmt, min(ROWS, k.lanes)
        self.many = fmt.elements // BLOCK  # blocks of activations
        self.each = 2 if self.kind.halves else 1  # scales of a run
        self.by_pairs = by_pairs(k, self.rows)
        self.amx = TileProducts(k, x.digits, self.each) if has_amx(k, self.rows) else None
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

    def multiply_group(self, tile: Value, group: Value) -> None:
        """Computes the results of a whole group by AMX, of rows behind the last one, too, which are not stored.

        Loads have to wait where AMX or a vector stored just now, so several runs take a step before one takes the next.
        """
        k, a, x, kind, many, runs = self.k, self.a, self.x, self.kind, self.many, self.kind.runs
        amx, first = self.amx, k.i64(0)
        assert amx is not None
        weights = self._weights(tile)
        acc = [[k.var(k.zeros(F32, self.rows)) for _ in range(GROUP)]]

        def view(number: Value) -> View:
            return View(k, weights + number // kind.parts * a.block_bytes, first, self.rows)

        together = max(1, amx.runs // runs)
        assert not self.kept or kind.parts % together == 0, "scales are kept of one block at a time"
        with k.range(0, a.B * kind.parts, together) as start:
            end = k.min(start + together, a.B * kind.parts)
            with k.range(start, end) as part:
                for run in range(runs):
                    self._fetch(view(part).block, part % kind.parts * runs + run)
                    amx.keep(kind.weights(view(part), part % kind.parts, run), (part - start) * runs + run)
            with k.range(start * runs, end * runs) as run:
                amx.multiply(x.at(group, run)[0], x.bytes, run - start * runs)
            if self.kept:
                with k.when((start % kind.parts).eq(0)):
                    self._keep([kind.scales(view(start))])
            with k.range(start * runs, end * runs) as run:
                scales, done = self._kept(0, run % many) if self.kept else kind.scales(view(run)), []
                for at in range(0, GROUP, AT_ONCE):
                    products = functools.partial(self._of_tiles, run - start * runs, at, done)
                    self._add([acc[0][at : at + AT_ONCE]], group, run, k.i64(at), [scales], products)
                    done = [sum_.v for sum_ in acc[0][at : at + AT_ONCE]]
        for i, sum_ in enumerate(acc[0]):
            row = group * GROUP + i
            with k.when(row < a.M):
                a.out.store(row * a.N + tile * ROWS, sum_.v)

    def _weights(self, tile: Value) -> Ptr:
        a = self.a
        return a.blocks + (a.layer[0].to(I64) * (a.N // ROWS) + tile) * (a.block_bytes * a.B)

    def _multiply(self, tile: Value, firsts: list[Value], group: Value, start: Value, count: int) -> None:
        k, a, kind, rows, size = self.k, self.a, self.kind, self.rows, self.a.block_bytes
        weights = self._weights(tile)
        acc = [[k.var(k.zeros(F32, rows)) for _ in range(count)] for _ in firsts]
        compute = self._in_pairs if self.by_pairs else self._chained
        with k.range(0, a.B) as b:
            views = [View(k, weights + b * size, first, rows) for first in firsts]
            scales = [kind.scales(view) for view in views]
            if not self.kept:
                self._fetch(weights + b * size, k.i64(0))
                products = functools.partial(compute, views=views, part=k.i64(0), run=0)
                self._add(acc, group, b, start, scales, products)
            else:
                self._keep(scales)
                with k.range(0, kind.parts) as part:
                    for run in range(kind.runs):
                        number = part * kind.runs + run
                        self._fetch(weights + b * size, number)
                        own = [self._kept(v, number) for v in range(len(views))]
                        products = functools.partial(compute, views=views, part=part, run=run)
                        self._add(acc, group, b * self.many + number, start, own, products)
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

    def _kept(self, vector: int, number: Value) -> Scales:
        """Returns what was kept of a run's scales and minima."""
        first = (number + vector * self.many) * self.each

        def load(place: Ptr) -> list[Value]:
            return [place.load((first + i) * self.rows, self.rows) for i in range(self.each)]

        return load(self.kept[0]), load(self.kept[1]) if self.kind.has_minimum else []

    def _add(
        self,
        acc: list[list[Var]],
        group: Value,
        number: Value,
        start: Value,
        scales: list[Scales],
        compute: Callable[[Ptr, list[list[Value]]], list[list[list[Value]]]],
    ) -> None:
        """Adds the products of a run of 32 weights to `acc` [vector][row of activations].

        `compute` returns them [vector][row of activations][scale], from digits and what to add for the weights' bias.
        """
        k, x, kind, rows = self.k, self.x, self.kind, self.rows
        digits, xd, sums = x.at(group, number)
        digits, xd, sums = digits + start * x.bytes, xd + start, sums + start * 2
        biases = [
            [k.splat(sums.as_(I32)[slot * 2 + j], rows) for j in range(2)] if kind.bias else []
            for slot in range(len(acc[0]))
        ]
        products = compute(digits, biases)
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
        """Returns a run's products, where an instruction adds them to 32-bit sums."""
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

    def _of_tiles(
        self, run: Value, first: int, done: list[Value], digits: Ptr, biases: list[list[Value]]
    ) -> list[list[list[Value]]]:
        """Returns the same for rows from `first` of a run that AMX has multiplied; they are read after `done`."""
        del digits
        assert self.amx is not None
        sums = self.amx.sums(run, first, len(biases), done)
        return [
            [
                [self._put_together(parts, bias, half) for half, parts in enumerate(row)]
                for row, bias in zip(sums, biases, strict=True)
            ]
        ]

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
    places = k.select(a.M > TOGETHER, k.i64(GROUP), a.M)
    a.require(
        a.S.eq(places), f"result xd: expected {GROUP} places in a group, up to {TOGETHER} rows as many as there are"
    )
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
        done = k.i64(0)  # rows of activations, a multiple of TOGETHER
        if tiles.amx:
            groups = (a.M + (GROUP - TOGETHER - 1)) // GROUP  # with more than TOGETHER rows
            done = groups * GROUP
            with k.when(groups > 0):
                tiles.amx.configure()
                with k.range(0, groups) as group, k.range(first, last) as tile:
                    tiles.multiply_group(tile, group)
                tiles.amx.release()
        with k.range(done, a.M // TOGETHER * TOGETHER, TOGETHER) as row, k.range(first, last) as tile:
            tiles.multiply(tile, row // GROUP, row % GROUP, TOGETHER)
        left = k.select(done < a.M, a.M % TOGETHER, 0)
        for count in (4, 2, 1):  # rows past the whole eights, by the bits of their number: 7 is 4 + 2 + 1
            row = a.M - left + (left & -2 * count)
            with k.when((left & count).ne(0)), k.range(first, last) as tile:
                tiles.multiply(tile, row // GROUP, row % GROUP, count)

    a.parallel(a.M, rounding)
    in_cache = k.max(k.i64(TASK_BYTES) // a.R // ROWS * ROWS, k.i64(ROWS))
    rows = task_rows(k, a, ROWS, k.select(a.M.eq(1), k.i64(MAX_TASK_ROWS), in_cache))
    tiles = rows // ROWS
    size = k.i64(fmt.bytes * ROWS)
    a.parallel((a.N // ROWS + tiles - 1) // tiles, task, task_tiles=tiles, block_bytes=size, B=blocks)
