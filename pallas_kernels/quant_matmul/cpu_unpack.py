"""Unpacks GGUF blocks into float32 vectors, written with `cpu_ffi.emit`: every weight is exact and in its natural place.

`UNPACKERS[kind](k, block)` reads a block's scales once and returns `part(i) -> vectors`: the weights of the i-th part of the
block (`PARTS[kind]` of them) as vectors of k.unit_lanes, in order. Only multiplying by the scale and adding
the minimum rounds, once (a fused multiply-add).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.emit import F16, F32, I16, I32, Emitter, Ptr, Value
from pallas_kernels.quant_matmul.formats import VALUES

Part = Callable[[int], list[Value]]
PARTS = {"q4_0": 32, "q4_1": 32, "q5_0": 32, "q5_1": 32, "q8_0": 32, "iq4_nl": 32, "mxfp4": 32,
         "q2_k": 32, "q3_k": 32, "q4_k": 64, "q5_k": 64, "q6_k": 128, "iq4_xs": 32,
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
        pairs = [_low_high_by_table(k, qs.load(i, 16), range(16)) for i in range(0, count, 16)]
        return [v for low, _ in pairs for v in low], [v for _, high in pairs for v in high]
    wide = [qs.load(i, k.unit_lanes).to(I32, signed=False) for i in range(0, count, k.unit_lanes)]
    return [(u & 15).to(F32) for u in wide], [(u >> 4).to(F32) for u in wide]


def _low_high_by_table(k: Emitter, bytes_: Value, values: Sequence[int]) -> tuple[list[Value], list[Value]]:
    """Does the same for 16 bytes without int → float conversions: Zen 1 does four lanes of them per cycle, none beside an FMA.

    Whole numbers up to 255 are exact in bfloat16: its two bytes are looked up and zipped, and are a float32's upper half.
    """
    bits = [struct.unpack("<I", struct.pack("<f", q))[0] >> 16 for q in values]
    tables = [[b >> shift & 255 for b in bits] for shift in (0, 8)]
    # bytes i and i + 4 of each eight side by side: they become the lower and upper half of one 32-bit lane
    paired = bytes_.shuffle([8 * half + j + 4 * side for half in (0, 1) for j in range(4) for side in (0, 1)])
    result = []
    for index in (paired & 15, paired >> 4):
        lower, upper = (look_up(k, index, table) for table in tables)
        vectors = []
        for half in (0, 8):
            zipped = lower.shuffle([half + j + 16 * side for j in range(8) for side in (0, 1)], upper)
            words = zipped.bits(ir.VectorType(I32, 4))
            vectors += [(words << 16).bits(ir.VectorType(F32, 4)), (words & -65536).bits(ir.VectorType(F32, 4))]
        result.append(vectors)
    return result[0], result[1]


def look_up(k: Emitter, codes: Value, table: Sequence[int]) -> Value:
    """Looks bytes below 16 up in a table of bytes."""
    vector, count = codes.type, codes.type.count
    wide = k.const(vector, list(table) * (count // 16))
    feature, name = {64: ("avx512bw", "avx512.pshuf.b.512"), 32: ("avx2", "avx2.pshuf.b")}.get(
        count, ("ssse3", "ssse3.pshuf.b.128")
    )
    if k.target.has(feature):
        return Value(k, k.intrinsic(f"llvm.x86.{name}", vector, [wide.ssa, codes.ssa]))
    if count == 16 and k.target.triple.split("-")[0] in ("aarch64", "arm64"):
        return Value(k, k.intrinsic("llvm.aarch64.neon.tbl1.v16i8", vector, [wide.ssa, codes.ssa]))
    left = [k.const(vector, byte) for byte in table]
    for bit in range(4):  # each bit of the codes halves the bytes that are left
        is_set = (codes & (1 << bit)).ne(0)
        left = [k.select(is_set, odd, even) for even, odd in zip(left[::2], left[1::2], strict=True)]
    return left[0]


def low_high_of(k: Emitter, qs: Ptr, values: Sequence[int]) -> tuple[list[Value], list[Value]]:
    """Unpacks 16 bytes of nibbles to float32 vectors of the values for which the low and the high ones stand."""
    bytes_ = qs.load(0, 16)
    if k.unit_lanes == 4 and k.target.has("ssse3"):
        return _low_high_by_table(k, bytes_, values)
    low, high = (widen(k, look_up(k, codes, values), signed=True) for codes in (bytes_ & 15, bytes_ >> 4))
    return low, high


def _add_fifth_bits(k: Emitter, quants: list[Value], at: Ptr) -> list[Value]:
    """Adds 16 to each of 32 quants whose bit is set in four bytes."""
    bits, result = k.splat(at.load(0, 4).bits(I32), k.unit_lanes), []
    for v, q in enumerate(quants):
        own = k.const(bits.type, [1 << (v * k.unit_lanes + lane) for lane in range(k.unit_lanes)])
        result.append(q + k.select((bits & own).ne(0), k.like(q, 16.0), 0.0))
    return result


def _scaled(k: Emitter, quants: list[Value], scale: Value) -> list[Value]:
    scale = k.splat(scale, k.unit_lanes)
    return [q * scale for q in quants]


def q4_0(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block, 1)
    low, high = low_high(k, block + 2, 16)
    return lambda i: _affine(k, low + high, d, d * -8.0)  # 8 d is exact: one rounding


def q4_1(k: Emitter, block: Ptr) -> Part:
    d, m = half_scales(block, 2)
    low, high = low_high(k, block + 4, 16)
    return lambda i: _affine(k, low + high, d, m)


def q5_0(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block, 1)
    low, high = low_high(k, block + 6, 16)
    return lambda i: _affine(k, _add_fifth_bits(k, low + high, block + 2), d, d * -16.0)


def q5_1(k: Emitter, block: Ptr) -> Part:
    d, m = half_scales(block, 2)
    low, high = low_high(k, block + 8, 16)
    return lambda i: _affine(k, _add_fifth_bits(k, low + high, block + 4), d, m)


def q8_0(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block, 1)
    quants = [(block + 2).load(i, k.unit_lanes).to(I32).to(F32) for i in range(0, 32, k.unit_lanes)]
    return lambda i: _scaled(k, quants, d)


def iq4_nl(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block, 1)
    low, high = low_high_of(k, block + 2, VALUES["iq4_nl"])
    return lambda i: _scaled(k, low + high, d)


def mxfp4(k: Emitter, block: Ptr) -> Part:
    exponent = block.load().to(I32, signed=False)
    # Half of 2^(exponent - 127), as VALUES are twice what FP4 says; the smallest two are subnormal.
    bits = k.select(exponent < 2, k.const(I32, 1 << 21) << exponent, (exponent - 1) << 23)
    low, high = low_high_of(k, block + 1, VALUES["mxfp4"])
    return lambda i: _scaled(k, low + high, bits.bits(F32))


def _halves(k: Emitter, scale: Value, i: int) -> list[Value]:
    """Returns the scales of the i-th 32 weights, of which each 16 have one: a vector for each vector of weights."""
    count = 32 // k.unit_lanes
    both = [k.splat(scale.lane(2 * i + half), k.unit_lanes) for half in (0, 1)]
    return [both[2 * v // count] for v in range(count)]


def q2_k(k: Emitter, block: Ptr) -> Part:
    d, dmin = half_scales(block + 80, 2)
    packed = block.load(0, 16)
    scale = (packed & 15).to(I32, signed=False).to(F32) * d
    minimum = (packed >> 4).to(I32, signed=False).to(F32) * (dmin * -1.0)

    def part(i: int) -> list[Value]:
        quants = widen(k, (block.load(16 + 32 * (i // 4), 32) >> (2 * (i % 4))) & 3)
        scales, minima = _halves(k, scale, i), _halves(k, minimum, i)
        return [k.fma(q, s, m) for q, s, m in zip(quants, scales, minima, strict=True)]

    return part


def q3_k(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block + 108, 1)
    low, high = block.load(96, 8), block.load(104, 4)
    low, high = k.concat([low & 15, low >> 4]), k.concat([(high >> (2 * i)) & 3 for i in range(4)])
    scale = ((low | (high << 4)) - 32).to(I32).to(F32) * d

    def part(i: int) -> list[Value]:
        pairs, third = (block.load(32 + 32 * (i // 4), 32) >> (2 * (i % 4))) & 3, (block.load(0, 32) >> i) & 1
        quants = widen(k, (pairs | (third << 2)) - 4, signed=True)
        return [q * s for q, s in zip(quants, _halves(k, scale, i), strict=True)]

    return part


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


def iq4_xs(k: Emitter, block: Ptr) -> Part:
    (d,) = half_scales(block, 1)
    high, low = block.load(2, 2), block.load(4, 4)
    low = k.concat([low & 15, low >> 4]).shuffle([0, 4, 1, 5, 2, 6, 3, 7])
    high = k.concat([(high >> (2 * i)) & 3 for i in range(4)]).shuffle([0, 2, 4, 6, 1, 3, 5, 7])
    scale = ((low | (high << 4)) - 32).to(I32).to(F32) * d

    def part(i: int) -> list[Value]:
        low, high = low_high_of(k, block + (8 + 16 * i), VALUES["iq4_xs"])
        return _scaled(k, low + high, scale.lane(i))

    return part


def f32(k: Emitter, block: Ptr) -> Part:
    return lambda i: [block.as_(F32).load(v, k.unit_lanes) for v in range(0, 32, k.unit_lanes)]


def f16(k: Emitter, block: Ptr) -> Part:
    return lambda i: [block.as_(F16).load(v, k.unit_lanes).to(F32) for v in range(0, 32, k.unit_lanes)]


def bf16(k: Emitter, block: Ptr) -> Part:
    return lambda i: [k.bf16_to_f32(block.as_(I16).load(v, k.unit_lanes)) for v in range(0, 32, k.unit_lanes)]


UNPACKERS: dict[str, Callable[[Emitter, Ptr], Part]] = {
    "q4_0": q4_0, "q4_1": q4_1, "q5_0": q5_0, "q5_1": q5_1, "q8_0": q8_0, "iq4_nl": iq4_nl, "mxfp4": mxfp4,
    "q2_k": q2_k, "q3_k": q3_k, "q4_k": q4_k, "q5_k": q5_k, "q6_k": q6_k, "iq4_xs": iq4_xs,
    "f32": f32, "f16": f16, "bf16": bf16,
}  # fmt: skip
