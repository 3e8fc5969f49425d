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
import math

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I8, I32, I64, Emitter, Ptr, Value, Var
from pallas_kernels.quant_matmul.cpu_dot import dot
from pallas_kernels.quant_matmul.cpu_tasks import task_rows
from pallas_kernels.quant_matmul.cpu_tile_kinds import KINDS, View
from pallas_kernels.quant_matmul.formats import BlockFormat
from pallas_kernels.quant_matmul.tiles import ROWS
from pallas_kernels.quant_matmul.tiles import TILE_GROUP as GROUP

BLOCK = 32
MAX_TASK_ROWS = 1024  # for M = 1: long runs of memory
TASK_BYTES = 384 << 10  # of weights, for M > 1: they stay in the L2 cache beside a group's activations
LARGEST = {1: 127, 2: 127 << 8, 3: 63 << 16}  # so that a block's sum fits 32 bits
INFINITY = 0x7F800000  # its bits
SMALLEST = 1e-30  # blocks of smaller numbers count as zeros: their scale's inverse would overflow


class Activations:
    """Activations block by block: digits [A, G, GROUP, digits, 32], scales [A, G, GROUP] and sums [A, G, GROUP, 2].

    A sum is that of the block's numbers, or of half of them. Where weights have a bias, the first sum is a whole number, in units
    of the scale and times -bias (where `split`, the first is that of all digits but the leading one, the second that of it);
    where they have minima, the last is a float32.
    """

    def __init__(self, k: Emitter, a: Frame, kind: str, digits: int, gated: bool) -> None:
        self.k, self.a, self.kind, self.digits, self.gated = k, a, KINDS[kind], digits, gated
        self.split = self.kind.most > 127 and digits == 3  # 8-bit weights times 23 bits do not fit 32

    def at(self, group: Value, block: Value) -> tuple[Ptr, Ptr, Ptr]:
        """Returns digits, scales and sums of one block of a group."""
        index = (group * self.a.G + block) * GROUP
        return self.a.xq + index * (self.digits * BLOCK), self.a.xd + index, self.a.xs + index * 2

    def round_row(self, m: Value) -> None:
        """Fills in activation row m, times silu of its gate where there is one."""
        k, a, lanes = self.k, self.a, self.k.lanes
        with k.range(0, a.G) as g:
            digits, scales, sums = self.at(m // GROUP, g)
            digits, slot = digits + m % GROUP * (self.digits * BLOCK), m % GROUP
            places = [m * a.K + g * BLOCK + i for i in range(0, BLOCK, lanes)]
            parts = [a.x.load(at, lanes) for at in places]
            if self.gated:
                gates = [a.gate.load(at, lanes) for at in places]
                parts = [x * (gate / (k.exp(gate * -1.0) + 1.0)) for x, gate in zip(parts, gates, strict=True)]
            # The bits of sizes have the order of the sizes, and those of what is not finite are the largest.
            sizes = [k.abs(part).bits(ir.VectorType(I32, lanes)) for part in parts]
            bits = k.max_lanes(functools.reduce(k.max, sizes))
            most = bits.bits(F32)
            inverse = k.select(most > SMALLEST, k.const(F32, float(LARGEST[self.digits])) / most, 0.0)
            scale = k.select(bits < INFINITY, most * (1.0 / LARGEST[self.digits]), k.const(F32, math.nan))
            scales[slot] = scale
            whole, lead = [], k.zeros(I32, lanes)
            for i, part in enumerate(parts):
                q = k.round_even(part * inverse).to(I32)
                whole.append(q)
                for d in reversed(range(self.digits)):
                    digits.store(d * BLOCK + i * lanes, q.to(I8))  # the lowest eight bits, signed
                    if d:
                        q = Value(k, k.builder.ashr((q - q.to(I8).to(I32)).ssa, k.like(q, 8).ssa))
                lead = lead + q
            self._store_sums(sums + slot * 2, whole, lead, scale)

    def _store_sums(self, sums: Ptr, parts: list[Value], lead: Value, scale: Value) -> None:
        k, kind = self.k, self.kind
        each = [parts[: len(parts) // 2], parts[len(parts) // 2 :]] if kind.halves else [parts]
        totals = [k.sum_lanes(functools.reduce(lambda x, y: x + y, half)) for half in each]
        if self.split:
            leading = k.sum_lanes(lead)
            sums.as_(I32)[0] = (totals[0] - (leading << 16)) * -kind.bias
            sums.as_(I32)[1] = leading * -kind.bias
            return
        if kind.bias:
            for i, total in enumerate(totals):
                sums.as_(I32)[i] = total * -kind.bias
        if kind.has_minimum:
            for i, total in enumerate(totals):
                sums[i + bool(kind.bias)] = scale * total.to(F32)


class _Tile:
    """Results of some rows of a group of activations for the weight rows of a tile, a vector of them after the other."""

    def __init__(self, k: Emitter, a: Frame, x: Activations, fmt: BlockFormat) -> None:
        self.k, self.a, self.x, self.kind = k, a, x, KINDS[fmt.kind]
        self.rows = min(ROWS, k.lanes)
        self.many = fmt.elements // BLOCK  # blocks of activations
        self.each = 2 if self.kind.halves else 1  # scales of a run
        # A block's scales are computed at once, and stay in memory while a loop goes through its parts.
        size = self.many * self.each * self.rows
        self.kept = [k.scratch(F32, size) for _ in range(2)] if self.many > 1 else []

    def multiply(self, tile: Value, group: Value, start: Value, count: int) -> None:
        """Computes the results of `count` rows from `start` of a group."""
        with self.k.range(0, ROWS, self.rows) as first:
            self._multiply(tile, first, group, start, count)

    def _multiply(self, tile: Value, first: Value, group: Value, start: Value, count: int) -> None:
        k, a, kind, rows, size = self.k, self.a, self.kind, self.rows, self.a.block_bytes
        weights = a.blocks + (a.layer[0].to(I64) * (a.N // ROWS) + tile) * (size * a.B)
        acc = [k.var(k.zeros(F32, rows)) for _ in range(count)]
        with k.range(0, a.B) as b:
            view = View(k, weights + b * size, first, rows)
            scales = kind.scales(view)
            if not self.kept:
                self._run(acc, group, b, start, *scales, kind.weights(view, k.i64(0), 0))
            else:
                for place, values in zip(self.kept, scales, strict=True):
                    for i, value in enumerate(values):
                        place.store(i * rows, value)
                with k.range(0, kind.parts) as part:
                    for run in range(kind.runs):
                        number = part * kind.runs + run
                        own_scales, own_minima = (
                            [
                                place.load((number * self.each + i) * rows, rows)
                                for i in range(self.each if values else 0)
                            ]
                            for place, values in zip(self.kept, scales, strict=True)
                        )
                        columns = kind.weights(view, part, run)
                        self._run(acc, group, b * self.many + number, start, own_scales, own_minima, columns)
        for i, sum_ in enumerate(acc):
            a.out.store((group * GROUP + start + i) * a.N + tile * ROWS + first, sum_.v)

    def _run(
        self,
        acc: list[Var],
        group: Value,
        number: Value,
        start: Value,
        scales: list[Value],
        minima: list[Value],
        columns: list[Value],
    ) -> None:
        """Adds the products of a run of 32 weights."""
        k, x, kind, rows = self.k, self.x, self.kind, self.rows
        digits, xd, sums = x.at(group, number)
        digits, xd, sums = digits + start * (x.digits * BLOCK), xd + start, sums + start * 2
        each = len(columns) // len(scales)
        if minima and kind.bias:
            bias = k.like(scales[0], float(kind.bias))
            minima = [k.fma(scale, bias, least) for scale, least in zip(scales, minima, strict=True)]
        for slot, sum_ in enumerate(acc):
            biases = [k.splat(sums.as_(I32)[slot * 2 + j], rows) for j in range(2)] if kind.bias else []

            def digit(total: Value, number: int, part: int, slot: int = slot) -> Value:
                at = digits + ((slot * x.digits + number) * BLOCK + 4 * part * each)
                return dot(k, total, columns[part * each : (part + 1) * each], at, kind.most)

            products = []
            for part in range(len(scales)):
                zeros = k.zeros(I32, rows)
                if x.split:
                    high = digit(biases[1], 0, part)
                    low = digit(digit(zeros, 1, part) << 8, 2, part) + biases[0]
                    products.append(k.fma(high.to(F32), k.like(scales[0], 65536.0), low.to(F32)))
                    continue
                alone = x.digits == 1 and bool(biases)
                whole = digit(biases[part] if alone else zeros, 0, part)
                for d in range(1, x.digits):
                    whole = digit(whole << 8, d, part)
                products.append((whole + biases[part] if biases and not alone else whole).to(F32))
            if kind.halves:
                both = k.fma(products[1], scales[1], products[0] * scales[0])
                sum_.v = k.fma(both, k.splat(xd[slot], rows), sum_.v)
            else:
                sum_.v = k.fma(products[0], scales[0] * xd[slot], sum_.v)
            for part, least in enumerate(minima):
                sum_.v = k.fma(least, k.splat(sums[slot * 2 + part + bool(kind.bias)], rows), sum_.v)


def body(k: Emitter, a: Frame, fmt: BlockFormat, digits: int, gated: bool) -> None:
    """Checks what the buffers' sizes do not say; cuts the activations into digits; then does a few tiles per task."""
    a.require((a.G * BLOCK).eq(a.K), f"result xd: expected K / {BLOCK} blocks")
    a.require((a.A * GROUP) >= a.M, f"result xd: expected groups of {GROUP} for all M rows")
    a.require((a.N % ROWS).eq(0), f"argument blocks: rows are not a multiple of {ROWS}")
    blocks = a.K // fmt.elements
    a.require((blocks * fmt.elements).eq(a.K), f"argument x: K is not a multiple of {fmt.elements} ({fmt.kind})")
    a.require((blocks * fmt.bytes).eq(a.R), f"argument blocks: rows do not hold K weights ({fmt.kind})")
    layer = a.layer[0].to(I64)
    a.require((layer >= 0) & (layer < a.L), "argument layer is out of range")

    def rounding(k: Emitter, a: Frame, number: Value) -> None:
        Activations(k, a, fmt.kind, digits, gated).round_row(number)

    def task(k: Emitter, a: Frame, number: Value) -> None:
        tiles = _Tile(k, a, Activations(k, a, fmt.kind, digits, gated), fmt)
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
