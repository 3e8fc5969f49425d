"""How the kernel for tiled rows reads each kind of block: the weights as unsigned bytes, and their scales.

A weight is scale · (byte - bias) + minimum. A run is 32 weights of a row, the size of a block of activations; the scales of
some kinds hold for half a run. A vector has a number, or four bytes, for each of some rows of a tile (see `tiles`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from pallas_kernels.cpu_ffi.emit import F16, F32, I16, I32, Emitter, Ptr, Value
from pallas_kernels.quant_matmul.cpu_unpack import look_up
from pallas_kernels.quant_matmul.formats import VALUES
from pallas_kernels.quant_matmul.tiles import ROWS


@dataclass
class View:
    """A block of a tile, of which `rows` neighbouring rows from `first` fill a vector. Places are counted in bytes of one row."""

    k: Emitter
    block: Ptr
    first: Value | int
    rows: int

    def half(self, number: int = 0) -> Value:
        """Returns a float16 of each row, as float32: the number-th of those with which the block begins."""
        return self.block.as_(F16).load(self.first + number * ROWS, self.rows).to(F32)

    def byte(self, place: int) -> Value:
        return self.block.load(self.first + place * ROWS, self.rows)

    def word(self, place: int) -> Value:
        return (self.block + place * ROWS).as_(I32).load(self.first, self.rows)

    def fours(self, place: Value | int, count: int) -> Iterator[Value]:
        """Yields `count` vectors of four neighbouring bytes of each row."""
        for i in range(count):
            yield (self.block + place * ROWS + self.first * 4).load(i * 4 * ROWS, 4 * self.rows)

    def nibbles(self, place: Value | int) -> Iterator[Value]:
        """Yields the weights of 16 bytes: their low four bits, then their high ones."""
        yield from (p & 15 for p in self.fours(place, 4))
        yield from (p >> 4 for p in self.fours(place, 4))


Scales = Callable[[View], tuple[list[Value], list[Value]]]
"""Returns (scales, minima) of a block, in the order of the runs or of their halves; no minima where the kind has none."""
Weights = Callable[[View, Value, int], Iterator[Value]]
"""(block, part, run of the part) → eight vectors of bytes, four weights of each row, in the order of the weights.

Each is read from the view's block when it is asked for."""


@dataclass(frozen=True)
class TileKind:
    """Reads a kind of block.

    Attributes:
        scales, weights: see the types. A block has `parts` of `runs` runs each. The code loops over parts and writes their
            runs out; four would be more than the cache of decoded instructions holds.
        most: largest byte of a weight; `bias`: what is to be taken from each.
        halves: whether half a run has a scale of its own; `has_minimum`: whether the scales come with minima.
    """

    scales: Scales
    weights: Weights
    most: int
    bias: int = 0
    parts: int = 1
    runs: int = 1
    halves: bool = False
    has_minimum: bool = False


def _one_half(v: View) -> tuple[list[Value], list[Value]]:
    return [v.half()], []


def _two_halves(v: View) -> tuple[list[Value], list[Value]]:
    return [v.half()], [v.half(1)]


def _exponents(v: View) -> tuple[list[Value], list[Value]]:
    """Returns the scales of MXFP4: powers of two, 2^(e - 128) since the table has twice the numbers."""
    k, exponent = v.k, v.byte(0).to(I32, signed=False)
    tiny = k.select(exponent.eq(1), k.like(exponent, 0x00400000), k.like(exponent, 0x00200000))  # subnormal
    return [k.select(exponent > 1, (exponent - 1) << 23, tiny).bits(ir.VectorType(F32, v.rows))], []


def _six_bits(v: View) -> tuple[list[Value], list[Value]]:
    """Returns the scales and minima of Q4_K and Q5_K: eight pairs of 6 bits, times two float16."""
    d, dmin = v.half(), v.half(1) * -1.0
    a, b, c = (v.word(4 + 4 * i) for i in range(3))
    scale = [a >> 8 * i & 63 for i in range(4)]
    scale += [(c >> 8 * i & 15) | (a >> 8 * i + 2 & 48) for i in range(4)]
    minimum = [b >> 8 * i & 63 for i in range(4)]
    minimum += [(c >> 8 * i + 4 & 15) | (b >> 8 * i + 2 & 48) for i in range(4)]
    return [s.to(F32) * d for s in scale], [m.to(F32) * dmin for m in minimum]


def _q2_k_scales(v: View) -> tuple[list[Value], list[Value]]:
    d, dmin = v.half(), v.half(1) * -1.0
    both = [v.byte(4 + i).to(I32, signed=False) for i in range(16)]
    return [(b & 15).to(F32) * d for b in both], [(b >> 4).to(F32) * dmin for b in both]


def _q3_k_scales(v: View) -> tuple[list[Value], list[Value]]:
    """Returns 16 scales of 6 bits less 32: the low four of them in eight bytes, the high two in four."""
    d = v.half()
    *low, high = (v.word(2 + 4 * i) for i in range(3))
    scales = []
    for i in range(16):
        lower = low[i // 4 % 2] >> 8 * (i % 4) + 4 * (i // 8) & 15
        shift = 8 * (i % 4) + 2 * (i // 4) - 4
        upper = (high >> shift if shift >= 0 else high << -shift) & 48
        scales.append(((lower | upper) - 32).to(F32) * d)
    return scales, []


def _q6_k_scales(v: View) -> tuple[list[Value], list[Value]]:
    d = v.half()
    return [v.byte(2 + i).to(I32).to(F32) * d for i in range(16)], []


def _iq4_xs_scales(v: View) -> tuple[list[Value], list[Value]]:
    """Returns eight scales of 6 bits less 32: the high two in 16 bits, the low four in four bytes."""
    d, high = v.half(), v.block.as_(I16).load(v.first + ROWS, v.rows).to(I32, signed=False)
    low = v.word(4)
    scales = [(low >> 4 * i & 15) | ((high >> 2 * i & 3) << 4) for i in range(8)]
    return [(s - 32).to(F32) * d for s in scales], []


def _q4_k(v: View, part: Value, run: int) -> Iterator[Value]:
    return (_shifted(p, run * 4) & 15 for p in v.fours(part * 32 + 16, 8))


def _q5_k(v: View, part: Value, run: int) -> Iterator[Value]:
    fifth = (_bit(bits, part * 2 + run) for bits in v.fours(16, 8))
    return (_shifted(p, run * 4) & 15 | (b << 4) for p, b in zip(v.fours(part * 32 + 48, 8), fifth, strict=True))


def _bit(bytes_: Value, number: Value) -> Value:
    return _shifted(bytes_, number) & 1


def _shifted(bytes_: Value, number: Value | int) -> Value:
    """Returns bytes whose lowest bits were those from bit `number` (to the left for negative ones), beside others' bits."""
    words = bytes_.bits(ir.VectorType(I32, bytes_.type.count // 4))
    if isinstance(number, int):
        return (words >> number if number >= 0 else words << -number).bits(bytes_.type)
    return (words >> bytes_.k.splat(number.to(I32), words.type.count)).bits(bytes_.type)


def _two_bits(v: View, place: Value | int, quarter: Value) -> Iterator[Value]:
    """Yields two bits of each of 32 bytes: the lowest, the next, the next or the highest."""
    return (_shifted(bytes_, quarter * 2) & 3 for bytes_ in v.fours(place, 8))


def _q2_k(v: View, part: Value, run: int) -> Iterator[Value]:
    return _two_bits(v, part // 4 * 32 + 20, part % 4)


def _q3_k(v: View, part: Value, run: int) -> Iterator[Value]:
    third = (_bit(bits, part) for bits in v.fours(14, 8))
    return (q | (bit << 2) for q, bit in zip(_two_bits(v, part // 4 * 32 + 46, part % 4), third, strict=True))


def _q6_k(v: View, part: Value, run: int) -> Iterator[Value]:
    half, quarter = part // 4 * 96, part % 4
    lower, upper = v.fours(half + quarter % 2 * 32 + 18, 8), _two_bits(v, half + 82, quarter)
    return (_shifted(q, quarter // 2 * 4) & 15 | _shifted(u, -4) for q, u in zip(lower, upper, strict=True))


def _fifth_bits(place: int) -> Weights:
    """Makes the reader of Q5_0 and Q5_1: 32 bits in the order of tiles, then nibbles."""

    def weights(v: View, part: Value, run: int) -> Iterator[Value]:
        del part, run
        (fifth,) = v.fours(place, 1)
        return (q | ((fifth >> c & 1) << 4) for c, q in enumerate(v.nibbles(place + 4)))

    return weights


def _table(place: int, kind: str, bias: int) -> Weights:
    """Makes the reader of runs of nibbles that stand for these values."""
    table = [(v + bias) & 255 for v in VALUES[kind]]
    return lambda v, part, run: (look_up(v.k, q, table) for q in v.nibbles(part * 16 + place))


def _nibbles(place: int) -> Weights:
    return lambda v, part, run: v.nibbles(place)


KINDS = {
    "q4_0": TileKind(_one_half, _nibbles(2), 15, 8),
    "q4_1": TileKind(_two_halves, _nibbles(4), 15, has_minimum=True),
    "q5_0": TileKind(_one_half, _fifth_bits(2), 31, 16),
    "q5_1": TileKind(_two_halves, _fifth_bits(4), 31, 16, has_minimum=True),
    "q8_0": TileKind(_one_half, lambda v, part, run: (b ^ -128 for b in v.fours(2, 8)), 255, 128),
    "iq4_nl": TileKind(_one_half, _table(2, "iq4_nl", 128), 241, 128),
    "mxfp4": TileKind(_exponents, _table(1, "mxfp4", 12), 24, 12),
    "q2_k": TileKind(_q2_k_scales, _q2_k, 3, 0, 8, halves=True, has_minimum=True),
    "q3_k": TileKind(_q3_k_scales, _q3_k, 7, 4, 8, halves=True),
    "q4_k": TileKind(_six_bits, _q4_k, 15, 0, 4, 2, has_minimum=True),
    "q5_k": TileKind(_six_bits, _q5_k, 31, 16, 4, 2, has_minimum=True),
    "q6_k": TileKind(_q6_k_scales, _q6_k, 63, 32, 8, halves=True),
    "iq4_xs": TileKind(_iq4_xs_scales, _table(8, "iq4_xs", 128), 241, 128, 8),
}
