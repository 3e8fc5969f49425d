"""Quantised matmul with int8 activations (`fast`): integer dot products of 32 numbers, scaled and summed in float32.

Activations are rounded to int8 in blocks of 32 with a scale each (as llama.cpp's Q8_1). A vector of the machine holds one number
for each of `lanes` weight rows: 16-bit sums of products are folded row against row, so that a block of 32 ends as one int32
per row and takes one conversion and two multiply-adds. The integers are exact, so a result has the same bits for
any M and any number of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F16, F32, I8, I16, I32, I64, Emitter, Ptr, Value
from pallas_kernels.quant_matmul.cpu_dot import add_pairs, has_bytes, multiply_add
from pallas_kernels.quant_matmul.cpu_tasks import task_rows
from pallas_kernels.quant_matmul.cpu_unpack import half_scales, k_scales
from pallas_kernels.quant_matmul.formats import BlockFormat

DIRECT_KINDS = ("q4_0", "q4_1", "q8_0")  # their blocks are read as they are when M = 1
BLOCK = 32
TILE_K = 2048  # weights of a tile row: at most 16 rows * 2 KiB
BLOCK_M = 96
MAX_TASK_ROWS = 128
STEP_M = 2
PREFETCH_ROWS = 8


def quantise_row(k: Emitter, a: Frame, m: Value) -> None:
    """Computes xq, xd (scale) and xs (scale * sum of the int8) of one activation row."""
    lanes = k.lanes
    with k.range(0, a.G) as g:
        at = m * a.K + g * BLOCK
        parts = [a.x.load(at + i, lanes) for i in range(0, BLOCK, lanes)]
        most = k.abs(parts[0])
        for part in parts[1:]:
            most = k.max(k.abs(part), most)
        most = k.max_lanes(most)
        inverse = k.select(most > 0.0, k.const(F32, 127.0) / most, 0.0)
        total = k.zeros(I32, lanes)
        for i, part in enumerate(parts):
            q = k.round_even(part * inverse).to(I32)
            total = total + q
            a.xq.store(at + i * lanes, q.to(I8))
        scale = most * (1.0 / 127.0)
        a.xd[m * a.G + g] = scale
        a.xs[m * a.G + g] = scale * k.sum_lanes(total).to(F32)


class _Rows(ABC):
    """As many weight rows as a vector has lanes, as the dot product needs them: row r in 128-bit lane r // 4 of slot r % 4.

    `block(b)` gives the four slots' weights of block b, 0 … 15 and 16 … 31 of it, and for each row the scale and the offset
    (None for the signed bytes of Q8_0, which have none).
    """

    def __init__(self, k: Emitter, a: Frame, fmt: BlockFormat) -> None:
        self.k, self.a, self.fmt, self.count = k, a, fmt, k.lanes

    def row(self, n: Value) -> Ptr:
        """Returns weight row n; past the end, the last one again."""
        index = self.a.layer[0].to(I64) * self.a.N + self.k.min(n, self.a.N - 1)
        return self.a.blocks + index * self.a.row_bytes

    @abstractmethod
    def block(self, b: Value) -> tuple[Iterator[tuple[Value, Value]], Value, Value | None]: ...


class _Direct(_Rows):
    """Rows read from the blocks themselves, for one or two activation rows; all rows must exist."""

    def set(self, n: Value) -> None:
        self.pointers = [self.row(n + r) for r in range(self.count)]

    def block(self, b: Value) -> tuple[Iterator[tuple[Value, Value]], Value, Value | None]:
        k, fmt = self.k, self.fmt
        blocks = [pointer + b * fmt.bytes for pointer in self.pointers]
        for block in blocks:
            (block + self.a.row_bytes * PREFETCH_ROWS).prefetch(0)
        has_minimum = fmt.kind == "q4_1"
        head = k.zeros(I32 if has_minimum else I16, self.count)
        for r, block in enumerate(blocks):
            head = head.with_lane(r, block.as_(I32 if has_minimum else I16)[0])
        halves = ir.VectorType(F16, self.count)
        scale = head.to(I16).bits(halves).to(F32)
        if fmt.kind == "q8_0":
            return self._byte_slots(blocks), scale, None
        offset = (head >> 16).to(I16).bits(halves).to(F32) if has_minimum else scale * -8.0
        return self._slots(blocks), scale, offset

    def _slots(self, blocks: list[Ptr]) -> Iterator[tuple[Value, Value]]:
        for slot in range(4):
            qs = self.k.concat([block.load(self.fmt.bytes - 16, 16) for block in blocks[slot::4]])
            yield qs & 15, qs >> 4

    def _byte_slots(self, blocks: list[Ptr]) -> Iterator[tuple[Value, Value]]:
        for slot in range(4):
            low, high = (self.k.concat([block.load(at, 16) for block in blocks[slot::4]]) for at in (2, 18))
            yield low, high


class _Tile(_Rows):
    """Rows unpacked into the L1 cache: bytes by (block, slot, half), scales and offsets by (block, row)."""

    def __init__(self, k: Emitter, a: Frame, fmt: BlockFormat) -> None:
        super().__init__(k, a, fmt)
        self.bytes = k.scratch(I8, self.count * TILE_K)
        self.scale, self.offset = (k.scratch(F32, self.count * TILE_K // BLOCK) for _ in range(2))
        self.vector = 4 * self.count  # bytes of a vector

    def fill(self, n: Value, k0: Value, length: Value) -> None:
        """Unpacks weights k0 … k0 + length - 1 of the rows from n on."""
        k, fmt = self.k, self.fmt
        with k.range(0, self.count) as r:
            row = self.row(n + r) + k0 // fmt.elements * fmt.bytes
            place = self.bytes + (r % 4 * (2 * self.vector) + r // 4 * 16)
            with k.range(0, length // fmt.elements) as b:
                block = row + b * fmt.bytes
                (block + self.a.row_bytes * PREFETCH_ROWS).prefetch(0)
                for g, (low, high, scale, offset) in enumerate(_unpack(k, block, fmt.kind)):
                    index = b * (fmt.elements // BLOCK) + g
                    at = index * (8 * self.vector)
                    place.store(at, low)
                    place.store(at + self.vector, high)
                    self.scale[index * self.count + r] = scale
                    if offset is not None:
                        self.offset[index * self.count + r] = offset

    def block(self, b: Value) -> tuple[Iterator[tuple[Value, Value]], Value, Value | None]:
        weights = self.bytes + b * (8 * self.vector)
        scale = self.scale.load(b * self.count, self.count)
        offset = None if self.fmt.kind == "q8_0" else self.offset.load(b * self.count, self.count)
        vectors = (weights.load(i * self.vector, self.vector) for i in range(8))
        return zip(vectors, vectors, strict=True), scale, offset


def _unpack(k: Emitter, block: Ptr, kind: str) -> list[tuple[Value, Value, Value, Value | None]]:
    """Unpacks a block into groups of 32: weights 0 … 15 and 16 … 31 as bytes, scale and offset: w = scale * q + offset."""
    if kind == "q4_0":
        (d,) = half_scales(block, 1)
        qs = block.load(2, 16)
        return [(qs & 15, qs >> 4, d, d * -8.0)]
    if kind == "q4_1":
        d, m = half_scales(block, 2)
        qs = block.load(4, 16)
        return [(qs & 15, qs >> 4, d, m)]
    if kind == "q8_0":
        (d,) = half_scales(block, 1)
        return [(block.load(2, 16), block.load(18, 16), d, None)]
    d, dmin = half_scales(block, 2)
    scale, minimum = k_scales(k, block + 4)
    scale, minimum = scale * d, minimum * (dmin * -1.0)
    groups: list[tuple[Value, Value, Value, Value | None]] = []
    for i in range(4):
        first, second = (block.load(16 + 32 * i + h, 16) for h in (0, 16))
        groups.append((first & 15, second & 15, scale.lane(2 * i), minimum.lane(2 * i)))
        groups.append((first >> 4, second >> 4, scale.lane(2 * i + 1), minimum.lane(2 * i + 1)))
    return groups


def _multiply(k: Emitter, a: Frame, rows: _Rows, m: Value, count: int, n: Value, k0: Value, length: Value) -> None:
    """Adds x[m …] · rows to the results of `count` activation rows; out holds the sum between tiles along K."""
    acc = [k.var(k.zeros(F32, rows.count)) for _ in range(count)]
    with k.when(k0 > 0):
        for i, sum_ in enumerate(acc):
            sum_.v = _load_out(k, a, (m + i) * a.N + n, n, rows.count)
    with k.range(0, length // BLOCK) as b:
        x = [a.xq + (m + i) * a.K + k0 + b * BLOCK for i in range(count)]
        everywhere = list(range(16)) * (rows.count // 4)
        halves = [[row.load(16 * h, 16).shuffle(everywhere) for h in (0, 1)] for row in x]
        sums: list[list[Value]] = [[] for _ in x]
        slots, scale, offset = rows.block(b)
        for low, high in slots:
            for i, (x_low, x_high) in enumerate(halves):
                if offset is None:
                    products = (_multiply_add_signed(k, low, x_low), _multiply_add_signed(k, high, x_high))
                    sums[i].append(add_pairs(k, products[0]) + add_pairs(k, products[1]))
                else:
                    sums[i].append(multiply_add(k, low, x_low) + multiply_add(k, high, x_high))
        for i, parts in enumerate(sums):
            at = (m + i) * a.G + k0 // BLOCK + b
            acc[i].v = k.fma(_fold_rows(k, parts).to(F32), scale * a.xd[at], acc[i].v)
            if offset is not None:
                acc[i].v = k.fma(offset, a.xs[at], acc[i].v)
    for i, sum_ in enumerate(acc):
        _store_out(k, a, (m + i) * a.N + n, sum_.v, n, rows.count)


def _load_out(k: Emitter, a: Frame, at: Value, n: Value, count: int) -> Value:
    """Loads out[at … at + count - 1]; at the last rows of the matrix, those past the end are 0."""
    result = k.var(k.zeros(F32, count))
    with k.when_else(n + count <= a.N) as (whole, part):
        with whole:
            result.v = a.out.load(at, count)
        with part:
            for i in range(count):
                with k.when(n + i < a.N):
                    result.v = result.v.with_lane(i, a.out[at + i])
    return result.v


def _store_out(k: Emitter, a: Frame, at: Value, value: Value, n: Value, count: int) -> None:
    with k.when_else(n + count <= a.N) as (whole, part):
        with whole:
            a.out.store(at, value)
        with part:
            for i in range(count):
                with k.when(n + i < a.N):
                    a.out.store(at + i, value.lane(i))


def _multiply_add_signed(k: Emitter, w: Value, s: Value) -> Value:
    """Multiplies signed bytes with signed bytes of at most 127 and adds neighbouring products in 16 bits."""
    count = w.type.count
    if not has_bytes(k, count):
        even, odd = range(0, count, 2), range(1, count, 2)
        w, s = w.to(I16), s.to(I16)
        return w.shuffle(even) * s.shuffle(even) + w.shuffle(odd) * s.shuffle(odd)
    # It is |w| · (s with the sign of w): two products of 128 and 127 still fit.
    if count == 64:
        negative = w < 0
        return multiply_add(k, k.select(negative, w * -1, w), k.select(negative, s * -1, s))
    name = {16: "llvm.x86.ssse3.psign.b.128", 32: "llvm.x86.avx2.psign.b"}[count]
    size, signed = (Value(k, k.intrinsic(name, w.type, [v.ssa, w.ssa])) for v in (w, s))
    return multiply_add(k, size, signed)


def _fold_rows(k: Emitter, slots: list[Value]) -> Value:
    """Folds four vectors, with eight int16 or four int32 of each row, into the sum of each row as int32, in row order.

    Sixteen products of 15 and 127 are at most 30480: all sums but the last fit 16 bits.
    """

    def zip_add(a: Value, b: Value, element: ir.IntType) -> Value:
        """Adds, in each 128-bit lane, (a0 b0 a1 b1 …) of the lower half and of the upper half, in units of `element`."""
        words, per_lane = a.type, 128 // element.width
        count = words.count * words.element.width // element.width
        a, b = (v.bits(ir.VectorType(element, count)) for v in (a, b))
        picks = []
        for upper in (0, per_lane // 2):
            lanes = [base + upper + i for base in range(0, count, per_lane) for i in range(per_lane // 2)]
            picks.append([j for i in lanes for j in (i, count + i)])
        return a.shuffle(picks[0], b).bits(words) + a.shuffle(picks[1], b).bits(words)

    folded = zip_add(zip_add(slots[0], slots[1], I32), zip_add(slots[2], slots[3], I32), I64)
    return folded if folded.type.element == I32 else add_pairs(k, folded)


def body(k: Emitter, a: Frame, fmt: BlockFormat) -> None:
    """Checks what the buffers' sizes do not say; rounds the activations; then does a few weight rows per task."""
    a.require((a.K % fmt.elements).eq(0), f"argument x: K is not a multiple of {fmt.elements} ({fmt.kind})")
    a.require((a.G * BLOCK).eq(a.K), "result xd: expected K / 32 scales per row")
    row_bytes = a.K // fmt.elements * fmt.bytes
    a.require(row_bytes.eq(a.R), f"argument blocks: rows do not hold K weights ({fmt.kind})")
    layer = a.layer[0].to(I64)
    a.require((layer >= 0) & (layer < a.L), "argument layer is out of range")

    def by_tile(k: Emitter, a: Frame, rows: _Tile, first: Value, last: Value) -> None:
        with k.range(0, a.M, BLOCK_M) as m0, k.range(0, a.K, TILE_K) as k0:
            length = k.min(a.K - k0, k.i64(TILE_K))
            m1 = k.min(m0 + BLOCK_M, a.M)
            whole = m0 + (m1 - m0) // STEP_M * STEP_M
            with k.range(first, last, rows.count) as n:
                rows.fill(n, k0, length)
                with k.range(m0, whole, STEP_M) as m:
                    _multiply(k, a, rows, m, STEP_M, n, k0, length)
                with k.when(whole < m1):
                    _multiply(k, a, rows, whole, 1, n, k0, length)

    def task(k: Emitter, a: Frame, number: Value) -> None:
        first = number * a.task_rows
        last = k.min(first + a.task_rows, a.N)
        tile = _Tile(k, a, fmt)
        if fmt.kind not in DIRECT_KINDS:
            by_tile(k, a, tile, first, last)
            return
        direct = _Direct(k, a, fmt)
        with k.when_else(a.M.eq(1)) as (one, many):
            with one:
                whole = first + (last - first) // direct.count * direct.count
                with k.range(first, whole, direct.count) as n:
                    direct.set(n)
                    _multiply(k, a, direct, k.i64(0), 1, n, k.i64(0), a.K)
                by_tile(k, a, tile, whole, last)
            with many:
                by_tile(k, a, tile, first, last)

    a.parallel(a.M, quantise_row)
    rows = task_rows(k, a, k.lanes, MAX_TASK_ROWS)
    a.parallel((a.N + rows - 1) // rows, task, row_bytes=row_bytes, task_rows=rows)
