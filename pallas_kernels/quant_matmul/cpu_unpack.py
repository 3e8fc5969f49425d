"""Unpacks GGUF blocks into float32 vectors, written with `cpu_ffi.emit`: every weight is exact and in its natural place.

`UNPACKERS[kind](k, block)` reads a block's scales once and returns `part(i) -> vectors`: the weights of the i-th part of the
block (`PARTS[kind]` of them) as vectors of k.unit_lanes, in order. Only multiplying by the scale and adding
the minimum rounds, once (a fused multiply-add).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from llvmlite import ir

from pallas_kernels.cpu_ffi.emit import F16, F32, I16, I32, Emitter, Ptr, Value

Part = Callable[[int], list[Value]]
PARTS = {"q4_0": 32, "q4_1": 32, "q8_0": 32, "q4_k": 64, "q5_k": 64, "q6_k": 128,
         "f32": 32, "f16": 32, "bf16": 32}  # weights per part  # fmt: skip


def half_scales(at: Ptr, count: int) -> list[Value]:
    """Loads `count` neighbouring float16 as float32 scalars."""
    if count == 1:
        return [at.as_(F16).load().to(F32)]
    pair = at.as_(F16).load(0, count).to(F32)
    return [pair.lane(i) for i in range(count)]


def widen(k: Emitter, bytes_: Value, signed: bool = False) -> list[Value]:
    """Widens a vector of int8 to float32 vectors, in the same order."""
    step = k.unit_lanes
    parts = [bytes_.shuffle(range(i, i + step)) for i in range(0, bytes_.type.count, step)]
    return [part.to(I32, signed).to(F32) for part in parts]


def _affine(k: Emitter, quants: list[Value], scale: Value, offset: Value) -> list[Value]:
    scale, offset = k.splat(scale, k.unit_lanes), k.splat(offset, k.unit_lanes)
    return [k.fma(q, scale, offset) for q in quants]


def low_high(k: Emitter, qs: Ptr, count: int) -> tuple[list[Value], list[Value]]:
    """Unpacks `count` bytes of nibbles to float32 vectors of the low and of the high ones."""
    if k.unit_lanes == 4 and k.target.has("ssse3"):
        pairs = [_low_high_by_table(k, qs.load(i, 16)) for i in range(0, count, 16)]
        return [v for low, _ in pairs for v in low], [v for _, high in pairs for v in high]
    wide = [qs.load(i, k.unit_lanes).to(I32, signed=False) for i in range(0, count, k.unit_lanes)]
    return [(u & 15).to(F32) for u in wide], [(u >> 4).to(F32) for u in wide]


def _low_high_by_table(k: Emitter, bytes_: Value) -> tuple[list[Value], list[Value]]:
    """Does the same for 16 bytes without int → float conversions: Zen 1 does four lanes of them per cycle, none beside an FMA.

    Whole numbers up to 15 are exact in bfloat16: its two bytes are looked up and zipped, and are a float32's upper half.
    """
    vector = bytes_.type
    bits = [struct.unpack("<I", struct.pack("<f", q))[0] >> 16 for q in range(16)]
    tables = [k.const(vector, [b >> shift & 255 for b in bits]) for shift in (0, 8)]
    # bytes i and i + 4 of each eight side by side: they become the lower and upper half of one 32-bit lane
    paired = bytes_.shuffle([8 * half + j + 4 * side for half in (0, 1) for j in range(4) for side in (0, 1)])
    result = []
    for index in (paired & 15, paired >> 4):
        lower, upper = (Value(k, k.intrinsic("llvm.x86.ssse3.pshuf.b.128", vector, [t.ssa, index.ssa])) for t in tables)
        vectors = []
        for half in (0, 8):
            zipped = lower.shuffle([half + j + 16 * side for j in range(8) for side in (0, 1)], upper)
            words = zipped.bits(ir.VectorType(I32, 4))
            vectors += [(words << 16).bits(ir.VectorType(F32, 4)), (words & -65536).bits(ir.VectorType(F32, 4))]
        result.append(vectors)
    return result[0], result[1]


def q4_0(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block, 1)
    low, high = low_high(k, block + 2, 16)
    return lambda i: _affine(k, low + high, d, d * -8.0)  # 8 d is exact: one rounding


def q4_1(k: Emitter, block: Ptr) -> Part:
    d, m = half_scales(block, 2)
    low, high = low_high(k, block + 4, 16)
    return lambda i: _affine(k, low + high, d, m)


def q8_0(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block, 1)
    scale = k.splat(d, k.unit_lanes)
    quants = [(block + 2).load(i, k.unit_lanes).to(I32).to(F32) for i in range(0, 32, k.unit_lanes)]
    return lambda i: [q * scale for q in quants]


def k_scales(k: Emitter, packed: Ptr) -> tuple[Value, Value]:
    """Unpacks 12 bytes to eight 6-bit scales and eight 6-bit minima, as float32 vectors of eight."""
    a, b, c = (packed.load(i, 4) for i in (0, 4, 8))
    scale = k.concat([a & 63, (c & 15) | ((a >> 6) << 4)])
    minimum = k.concat([b & 63, (c >> 4) | ((b >> 6) << 4)])
    return scale.to(I32, signed=False).to(F32), minimum.to(I32, signed=False).to(F32)


def q4_k(k: Emitter, block: Ptr) -> Part:
    d, dmin = half_scales(block, 2)
    scale, minimum = k_scales(k, block + 4)
    scale, minimum = scale * d, minimum * (dmin * -1.0)

    def part(i: int) -> list[Value]:
        low, high = low_high(k, block + (16 + 32 * i), 32)
        lanes = [(scale.lane(g), minimum.lane(g)) for g in (2 * i, 2 * i + 1)]
        return _affine(k, low, *lanes[0]) + _affine(k, high, *lanes[1])

    return part


def q5_k(k: Emitter, block: Ptr) -> Part:
    d, dmin = half_scales(block, 2)
    scale, minimum = k_scales(k, block + 4)
    scale, minimum = scale * d, minimum * (dmin * -1.0)

    def part(i: int) -> list[Value]:
        result, low_bits, fifth = [], block.load(48 + 32 * i, 32), block.load(16, 32)
        for g, q in ((2 * i, low_bits & 15), (2 * i + 1, low_bits >> 4)):
            q = q | (((fifth >> g) & 1) << 4)
            result += _affine(k, widen(k, q), scale.lane(g), minimum.lane(g))
        return result

    return part


def q6_k(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block + 208, 1)
    scale = block.load(192, 16).to(I32).to(F32) * d

    def part(i: int) -> list[Value]:
        result, lows = [], [block.load(64 * i + 32 * j, 32) for j in (0, 1)]
        upper = block.load(128 + 32 * i, 32)
        for g in range(4):
            low = lows[g % 2] >> 4 if g >= 2 else lows[g % 2] & 15
            quants = widen(k, (low | (((upper >> (2 * g)) & 3) << 4)) - 32, signed=True)
            scales = [k.splat(scale.lane(8 * i + 2 * g + half), k.unit_lanes) for half in (0, 1)]
            result += [q * scales[2 * j // len(quants)] for j, q in enumerate(quants)]
        return result

    return part


def f32(k: Emitter, block: Ptr) -> Part:
    return lambda i: [block.as_(F32).load(v, k.unit_lanes) for v in range(0, 32, k.unit_lanes)]


def f16(k: Emitter, block: Ptr) -> Part:
    return lambda i: [block.as_(F16).load(v, k.unit_lanes).to(F32) for v in range(0, 32, k.unit_lanes)]


def bf16(k: Emitter, block: Ptr) -> Part:
    return lambda i: [k.bf16_to_f32(block.as_(I16).load(v, k.unit_lanes)) for v in range(0, 32, k.unit_lanes)]


UNPACKERS: dict[str, Callable[[Emitter, Ptr], Part]] = {
    "q4_0": q4_0, "q4_1": q4_1, "q8_0": q8_0, "q4_k": q4_k, "q5_k": q5_k, "q6_k": q6_k,
    "f32": f32, "f16": f16, "bf16": bf16,
}  # fmt: skip
