"""Quantised matmul on tiled rows (see `tiles`): integer dot products of activations cut into 8-bit digits.

In blocks of 32, activations become whole numbers times a scale: of 23 bits for `exact`, three digits in base 256, and of one
or two digits for `fast` (one is llama.cpp's Q8_1). Four weights of 16 rows times four activations are one instruction
(vpdpbusd of AVX-512 VNNI). Shifts put the digits' sums together, so a block of 32 is an exact integer per row and takes one
conversion and one or two multiply-adds. Three digits err by at most 2^-22 of a block's largest activation, on the whole
less than a float32 sum. No path depends on M or on the number of threads: a row of the result has the same bits in any batch.
"""

from __future__ import annotations

import functools
import math

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F16, F32, I8, I32, I64, Emitter, Ptr, Value
from pallas_kernels.quant_matmul.cpu_tasks import task_rows
from pallas_kernels.quant_matmul.formats import BlockFormat
from pallas_kernels.quant_matmul.tiles import HEADS, ROWS
from pallas_kernels.quant_matmul.tiles import TILE_GROUP as GROUP

BLOCK = 32
MAX_TASK_ROWS = {True: 1024, False: 256}  # for M = 1, long runs of memory; else they stay in the L2 cache
BIAS = {"q4_0": 8, "q4_1": 0, "q8_0": 128}  # the excess of the dot product's unsigned numbers
LARGEST = {1: 127, 2: 127 << 8, 3: 63 << 16}  # so that a block's sum fits 32 bits
INFINITY = 0x7F800000  # its bits
SMALLEST = 1e-30  # blocks of smaller numbers count as zeros: their scale's inverse would overflow


class Activations:
    """Activations block by block: digits [A, G, GROUP, digits, 32], scales [A, G, GROUP] and sums [A, G, GROUP, 2].

    A sum is that of the block's numbers: in units of the scale and times -bias for kinds with a bias (for the leading digit
    and the others apart where `split`), else as float32.
    """

    def __init__(self, k: Emitter, a: Frame, kind: str, digits: int, gated: bool) -> None:
        self.k, self.a, self.bias, self.digits, self.gated = k, a, BIAS[kind], digits, gated
        self.split = kind == "q8_0" and digits == 3  # 8-bit weights times 23 bits do not fit 32

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
            whole = lead = k.zeros(I32, lanes)
            for i, part in enumerate(parts):
                q = k.round_even(part * inverse).to(I32)
                whole = whole + q
                for d in reversed(range(self.digits)):
                    digits.store(d * BLOCK + i * lanes, q.to(I8))  # the lowest eight bits, signed
                    if d:
                        q = Value(k, k.builder.ashr((q - q.to(I8).to(I32)).ssa, k.like(q, 8).ssa))
                lead = lead + q
            total = k.sum_lanes(whole)
            if not self.bias:
                sums[slot * 2] = scale * total.to(F32)
            elif self.split:
                leading = k.sum_lanes(lead)
                sums.as_(I32)[slot * 2] = (total - (leading << 16)) * -self.bias
                sums.as_(I32)[slot * 2 + 1] = leading * -self.bias
            else:
                sums.as_(I32)[slot * 2] = total * -self.bias


def unpack(k: Emitter, body: Ptr, kind: str) -> list[Value]:
    """Unpacks a tile's block into unsigned bytes, four weights of each row per vector, in the order of the weights."""
    vector = 4 * ROWS
    if kind == "q8_0":
        return [body.load(i * vector, vector) ^ -128 for i in range(8)]
    pairs = [body.load(i * vector, vector) for i in range(4)]
    return [p & 15 for p in pairs] + [p >> 4 for p in pairs]


def dot4(k: Emitter, total: Value, weights: Value, four: Ptr) -> Value:
    """Returns total[r] + the sum of weights[4 r + i] (unsigned) times four[i] (signed)."""
    lanes = total.type.count
    if lanes == 16 and k.target.has("avx512vnni"):
        x = k.splat(four.as_(I32).load(), lanes).bits(weights.type)
        return Value(k, k.intrinsic("llvm.x86.avx512.vpdpbusd.512", total.type, [total.ssa, weights.ssa, x.ssa]))
    for i in range(4):
        column = weights.shuffle(range(i, 4 * lanes, 4)).to(I32, signed=False)
        total = total + column * four[i].to(I32)
    return total


def multiply(
    k: Emitter, a: Frame, x: Activations, kind: str, tile: Value, group: Value, first: int, count: int
) -> None:
    """Computes the results of `count` rows from `first` of a group for the 16 weight rows of a tile."""
    block_bytes = a.block_bytes
    weights = a.blocks + (a.layer[0].to(I64) * (a.N // ROWS) + tile) * (block_bytes * a.G)
    acc = [k.var(k.zeros(F32, ROWS)) for _ in range(count)]
    head = 2 * HEADS[kind] * ROWS
    with k.range(0, a.G) as b:
        block = weights + b * block_bytes
        halves = [block.as_(F16).load(i * ROWS, ROWS).to(F32) for i in range(HEADS[kind])]
        columns = unpack(k, block + head, kind)
        digits, scales, sums = x.at(group, b)
        for i in range(count):
            slot = first + i
            bias = [k.splat(sums.as_(I32)[slot * 2 + j], ROWS) for j in (0, 1)]

            def digit(total: Value, number: int, slot: int = slot) -> Value:
                for j, column in enumerate(columns):
                    total = dot4(k, total, column, digits + ((slot * x.digits + number) * BLOCK + 4 * j))
                return total

            if x.split:
                high = digit(bias[1], 0)
                low = digit(digit(k.zeros(I32, ROWS), 1) << 8, 2) + bias[0]
                product = k.fma(high.to(F32), k.like(halves[0], 65536.0), low.to(F32))
            else:
                whole = digit(bias[0] if x.bias and x.digits == 1 else k.zeros(I32, ROWS), 0)
                for number in range(1, x.digits):
                    whole = digit(whole << 8, number)
                product = (whole + bias[0] if x.bias and x.digits > 1 else whole).to(F32)
            acc[i].v = k.fma(product, halves[0] * scales[slot], acc[i].v)
            if not x.bias:
                acc[i].v = k.fma(halves[1], k.splat(sums[slot * 2], ROWS), acc[i].v)
    for i, sum_ in enumerate(acc):
        a.out.store((group * GROUP + first + i) * a.N + tile * ROWS, sum_.v)


def body(k: Emitter, a: Frame, fmt: BlockFormat, digits: int, gated: bool) -> None:
    """Checks what the buffers' sizes do not say; cuts the activations into digits; then does a few tiles per task."""
    a.require((a.G * BLOCK).eq(a.K), "result xd: expected K / 32 blocks")
    a.require((a.A * GROUP) >= a.M, f"result xd: expected groups of {GROUP} for all M rows")
    a.require((a.N % ROWS).eq(0), f"argument blocks: rows are not a multiple of {ROWS}")
    a.require((a.G * fmt.bytes).eq(a.R), f"argument blocks: rows do not hold K weights ({fmt.kind})")
    layer = a.layer[0].to(I64)
    a.require((layer >= 0) & (layer < a.L), "argument layer is out of range")

    def rounding(k: Emitter, a: Frame, number: Value) -> None:
        Activations(k, a, fmt.kind, digits, gated).round_row(number)

    def task(k: Emitter, a: Frame, number: Value) -> None:
        x = Activations(k, a, fmt.kind, digits, gated)
        first = number * a.task_tiles
        last = k.min(first + a.task_tiles, a.N // ROWS)
        whole = a.M // GROUP
        with k.range(0, whole) as group, k.range(first, last) as tile:
            multiply(k, a, x, fmt.kind, tile, group, 0, GROUP)
        left = a.M % GROUP
        for start, count in ((0, 4), (4, 2), (0, 2), (6, 1), (4, 1), (2, 1), (0, 1)):
            # Rows past the whole groups, by the bits of their number: 7 is 4 + 2 + 1.
            there = (left & count).ne(0) & (left & ~(2 * count - 1) & 7).eq(start)
            with k.when(there), k.range(first, last) as tile:
                multiply(k, a, x, fmt.kind, tile, whole, start, count)

    a.parallel(a.M, rounding)
    rows = task_rows(k, a, ROWS, k.select(a.M.eq(1), k.i64(MAX_TASK_ROWS[True]), k.i64(MAX_TASK_ROWS[False])))
    tiles = rows // ROWS
    a.parallel((a.N // ROWS + tiles - 1) // tiles, task, task_tiles=tiles, block_bytes=k.i64(fmt.bytes * ROWS))
