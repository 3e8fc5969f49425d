"""Quantised matmul on the CPU from the file's own GGUF blocks: float32 activations × exactly dequantised weights.

out[m, n] is a dot product along K in one vector accumulator, one fused multiply-add per vector, lanes summed in a fixed tree
at the end. Every path below keeps that order, so a row of the result has the same bits for any M and any number of threads.
One activation row goes straight from registers; more rows use a tile of four dequantised weight rows in the L1 cache.
"""

from __future__ import annotations

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I8, I64, Emitter, Ptr, Value
from pallas_kernels.quant_matmul.cpu_tasks import task_rows
from pallas_kernels.quant_matmul.cpu_unpack import PARTS, UNPACKERS
from pallas_kernels.quant_matmul.formats import BlockFormat

TILE_ROWS = 4  # weight rows of a tile: their four sums are one vector store
TILE_K = 768  # weights of a tile row: 4 * 768 * 4 bytes = 12 KiB, with the activations under 32 KiB of L1
BLOCK_M = 96  # activation rows that stay in L2 (96 * 768 * 4 = 288 KiB) while a task's weight rows pass
TASK_ROWS = 32  # most weight rows per task
PREFETCH_ROWS = 8  # rows ahead: a row is too short for the hardware to see a stream
# Weight rows whose sums are in flight together when M = 1: enough to hide the latency, few enough for the registers.
ROWS_AT_ONCE = {
    "q4_0": 2, "q4_1": 2, "q5_0": 2, "q5_1": 2, "q8_0": 4, "iq4_nl": 2, "mxfp4": 2,
    "q2_k": 1, "q3_k": 1, "q4_k": 1, "q5_k": 1, "q6_k": 1, "iq4_xs": 1,
    "f32": 4, "f16": 4, "bf16": 4,
}  # fmt: skip


def store_row(k: Emitter, out: Ptr, index: Value, four: Value, n: Value, count: Value) -> None:
    """Stores out[index … index+3], as far as n … n+3 are below count."""
    with k.when_else(n + 4 <= count) as (whole, part):
        with whole:
            out.store(index, four)
        with part:
            for i in range(4):
                with k.when(n + i < count):
                    out.store(index + i, four.lane(i))


def weight_rows(k: Emitter, a: Frame, n: Value) -> list[Ptr]:
    """Returns pointers to four weight rows from n; past the end, the last row again (its results are not stored)."""
    layer = a.layer[0].to(I64)
    return [a.blocks.as_(I8) + (layer * a.N + k.min(n + r, a.N - 1)) * a.row_bytes for r in range(TILE_ROWS)]


def _single_row(k: Emitter, a: Frame, fmt: BlockFormat, first: Value, last: Value) -> None:
    """Unpacks and multiplies in registers, for M = 1."""
    width, part = k.unit_lanes, PARTS[fmt.kind]
    with k.range(first, last, TILE_ROWS) as n:
        rows = weight_rows(k, a, n)
        acc = [[k.var(k.zeros(F32, width)) for _ in range(k.lanes // width)] for _ in rows]
        at_once = ROWS_AT_ONCE[fmt.kind]
        for r in range(0, TILE_ROWS, at_once):
            with k.range(0, a.K // fmt.elements) as b:
                done = []
                for row, sums in zip(rows[r : r + at_once], acc[r : r + at_once], strict=True):
                    block = row + b * fmt.bytes
                    (block + a.row_bytes * PREFETCH_ROWS).prefetch(0)
                    weights = UNPACKERS[fmt.kind](k, block.after(*done))
                    x = (a.x + b * fmt.elements).after(*done)
                    for i in range(fmt.elements // part):
                        for v, w in enumerate(weights(i)):
                            sum_ = sums[v % len(sums)]
                            sum_.v = k.fma(w, x.load(i * part + v * width, width), sum_.v)
                    done = [sum_.v for sum_ in sums]
        store_row(k, a.out, n, k.sum4([k.concat([v.v for v in sums]) for sums in acc]), n, a.N)


class _Tile:
    """Four dequantised weight rows of TILE_K weights, and the sums of a task's rows between two tiles along K."""

    def __init__(self, k: Emitter, a: Frame, fmt: BlockFormat) -> None:
        self.k, self.a, self.fmt = k, a, fmt
        self.weights = k.scratch(F32, TILE_ROWS * TILE_K)
        self.carry = k.scratch(F32, BLOCK_M * TASK_ROWS * k.lanes)

    def fill(self, n: Value, k0: Value, length: Value) -> None:
        """Dequantises weights k0 … k0 + length - 1 of the weight rows n … n + 3."""
        k, a, fmt, part = self.k, self.a, self.fmt, PARTS[self.fmt.kind]
        for r, row in enumerate(weight_rows(k, a, n)):
            blocks = row + (k0 // fmt.elements) * fmt.bytes
            with k.range(0, length // fmt.elements) as b:
                block = blocks + b * fmt.bytes
                (block + a.row_bytes * PREFETCH_ROWS).prefetch(0)
                weights = UNPACKERS[fmt.kind](k, block)
                for i in range(fmt.elements // part):
                    for v, w in enumerate(weights(i)):
                        self.weights.store(b * fmt.elements + (r * TILE_K + i * part + v * k.unit_lanes), w)

    def multiply(self, m: Value, count: int, n: Value, k0: Value, length: Value, carry: Ptr) -> None:
        """Adds x[m] · weights for `count` activation rows, in registers; the last tile along K writes the results."""
        k, a, lanes = self.k, self.a, self.k.lanes
        x = [a.x + (m + i) * a.K + k0 for i in range(count)]
        acc = [[k.var(k.zeros(F32, lanes)) for _ in range(TILE_ROWS)] for _ in x]
        slots = [(acc[i][r], (i * TILE_ROWS + r) * lanes) for i in range(count) for r in range(TILE_ROWS)]
        with k.when(k0 > 0):
            for var, at in slots:
                var.v = carry.load(at, lanes)
        with k.range(0, length, lanes) as at:
            rows = [row.load(at, lanes) for row in x]
            for r in range(TILE_ROWS):
                w = self.weights.load(at + r * TILE_K, lanes)
                for i, row in enumerate(rows):
                    acc[i][r].v = k.fma(w, row, acc[i][r].v)
        with k.when_else(k0 + length < a.K) as (more, end):
            with more:
                for var, at in slots:
                    carry.store(at, var.v)
            with end:
                for i in range(count):
                    store_row(k, a.out, (m + i) * a.N + n, k.sum4([var.v for var in acc[i]]), n, a.N)


def _many_rows(k: Emitter, a: Frame, fmt: BlockFormat, first: Value, last: Value) -> None:
    """Dequantises four weight rows into a tile and multiplies all activation rows with it, for M > 1."""
    step_m = 6 if k.registers >= 32 else 3
    tile = _Tile(k, a, fmt)
    with k.range(0, a.M, BLOCK_M) as m0, k.range(0, a.K, TILE_K) as k0:
        length = k.min(a.K - k0, k.i64(TILE_K))
        m1 = k.min(m0 + BLOCK_M, a.M)
        whole = m0 + (m1 - m0) // step_m * step_m
        with k.range(first, last, TILE_ROWS) as n:
            tile.fill(n, k0, length)
            carry = tile.carry + (n - first) * (BLOCK_M * k.lanes)
            with k.range(m0, whole, step_m) as m:
                tile.multiply(m, step_m, n, k0, length, carry + (m - m0) * (TILE_ROWS * k.lanes))
            for left in range(1, step_m):
                with k.when((m1 - whole).eq(left)):
                    tile.multiply(whole, left, n, k0, length, carry + (whole - m0) * (TILE_ROWS * k.lanes))


def body(k: Emitter, a: Frame, fmt: BlockFormat) -> None:
    """Checks what the buffers' sizes do not say; then does a few weight rows per task."""
    a.require((a.K % fmt.elements).eq(0), f"argument x: K is not a multiple of {fmt.elements} ({fmt.kind})")
    row_bytes = a.K // fmt.elements * fmt.bytes
    a.require(row_bytes.eq(a.R * fmt.item_bytes), f"argument blocks: rows do not hold K weights ({fmt.kind})")
    layer = a.layer[0].to(I64)
    a.require((layer >= 0) & (layer < a.L), "argument layer is out of range")

    def task(k: Emitter, a: Frame, number: Value) -> None:
        first = number * a.task_rows
        last = k.min(first + a.task_rows, a.N)
        with k.when_else(a.M.eq(1)) as (one, many):
            with one:
                _single_row(k, a, fmt, first, last)
            with many:
                _many_rows(k, a, fmt, first, last)

    # For M > 1 a task has only as many rows as there is room for their sums between two tiles along K.
    rows = task_rows(k, a, TILE_ROWS, k.select(a.M.eq(1), k.i64(4 * TASK_ROWS), k.i64(TASK_ROWS)))
    a.parallel((a.N + rows - 1) // rows, task, row_bytes=row_bytes, task_rows=rows)
