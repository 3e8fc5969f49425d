"""Cuts activations into digits of 8 to 16 bits for the kernel for tiled rows, in blocks of 32 with a scale each."""

from __future__ import annotations

import functools
import math

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I8, I16, I32, I64, Emitter, Ptr, Value
from pallas_kernels.quant_matmul.cpu_dot import by_pairs
from pallas_kernels.quant_matmul.cpu_tile_kinds import KINDS
from pallas_kernels.quant_matmul.tiles import ROWS
from pallas_kernels.quant_matmul.tiles import TILE_GROUP as GROUP

BLOCK = 32
LARGEST = {1: 127, 2: 127 << 8, 3: 63 << 16}  # so that a block's sum fits 32 bits
INFINITY = 0x7F800000  # its bits
SMALLEST = 1e-30  # blocks of smaller numbers count as zeros: their scale's inverse would overflow


def units(kind: str, digits: int) -> int:
    """Returns the number of bytes that a number takes, see `Activations`."""
    return {1: 2, 2: 2, 3: 4}[digits] if _in_words(kind, digits) else digits


def _in_words(kind: str, digits: int) -> bool:
    """Checks whether digits of more than 8 bits are better where products of bytes come as 16-bit sums of pairs.

    Bytes above 127 would overflow the sums. Those above 31 leave room for two pairs alone, so that 8-bit digits gain little.
    """
    return KINDS[kind].most > (127 if digits == 1 else 31)


class Activations:
    """Activations block by block: digits [A, G, S, units, 32], scales [A, G, S] and sums [A, G, S, 2].

    A digit has 8 bits. With `by_words` there is one of 16 bits, or two of 12, and the middle two of each four change places.

    A sum is that of the block's numbers, or of half of them. Where weights have a bias, the first sum is a whole number, in units
    of the scale and times -bias (where `split`, the first is that of all digits but the leading one, the second that of it);
    where they have minima, the last is a float32.
    """

    def __init__(self, k: Emitter, a: Frame, kind: str, digits: int, gated: bool, normed: bool) -> None:
        self.k, self.a, self.kind, self.gated, self.normed = k, a, KINDS[kind], gated, normed
        self.largest = LARGEST[digits]
        self.split = self.kind.most > 127 and digits == 3  # 8-bit weights times 23 bits do not fit 32
        self.by_words = _in_words(kind, digits) and by_pairs(k, min(ROWS, k.lanes))
        self.digits, self.bits = (max(1, digits - 1), 12) if self.by_words else (digits, 8)
        self.digit_bytes = 2 * BLOCK if self.by_words else BLOCK
        self.bytes = units(kind, digits) * BLOCK

    @property
    def leading(self) -> int:
        """The number by which the leading digit counts."""
        return 1 << self.bits * (self.digits - 1)

    def at(self, group: Value, block: Value) -> tuple[Ptr, Ptr, Ptr]:
        """Returns digits, scales and sums of one block of a group."""
        index = (group * self.a.G + block) * self.a.S
        return self.a.xq + index * self.bytes, self.a.xd + index, self.a.xs + index * 2

    def round_row(self, m: Value) -> None:
        """Fills in activation row m, after its norm or times silu of its gate where there is one."""
        k, a, lanes = self.k, self.a, self.k.lanes
        factor = self._norm_factor(m) if self.normed else None
        with k.range(0, a.G) as g:
            digits, scales, sums = self.at(m // GROUP, g)
            digits, slot = digits + m % GROUP * self.bytes, m % GROUP
            places = [m * a.K + g * BLOCK + i for i in range(0, BLOCK, lanes)]
            parts = [a.x.load(at, lanes) for at in places]
            if self.gated:
                gates = [a.gate.load(at, lanes) for at in places]
                parts = [x * (gate / (k.exp(gate * -1.0) + 1.0)) for x, gate in zip(parts, gates, strict=True)]
            if factor is not None:
                first = a.norm_layer[0].to(I64) * a.K + g * BLOCK
                parts = [x * factor * a.norm.load(first + i * lanes, lanes) for i, x in enumerate(parts)]
            # The bits of sizes have the order of the sizes, and those of what is not finite are the largest.
            sizes = [k.abs(part).bits(ir.VectorType(I32, lanes)) for part in parts]
            bits = k.max_lanes(functools.reduce(k.max, sizes))
            most = bits.bits(F32)
            inverse = k.select(most > SMALLEST, k.const(F32, float(self.largest)) / most, 0.0)
            scale = k.select(bits < INFINITY, most * (1.0 / self.largest), k.const(F32, math.nan))
            scales[slot] = scale
            whole, lead = [], k.zeros(I32, lanes)
            for i, part in enumerate(parts):
                q = k.round_even(part * inverse).to(I32)
                whole.append(q)
                lead = lead + self._store_digits(digits, i * lanes, q)
            self._store_sums(sums + slot * 2, whole, lead, scale)

    def _norm_factor(self, m: Value) -> Value:
        """Returns one over the root mean square of row m."""
        k, a, lanes = self.k, self.a, self.k.lanes
        squares = k.var(k.zeros(F32, lanes))
        with k.range(0, a.K, lanes) as i:
            x = a.x.load(m * a.K + i, lanes)
            squares.v = k.fma(x, x, squares.v)
        mean = k.sum_lanes(squares.v) / a.K.to(F32) + a.eps[0]
        return k.const(F32, 1.0) / k.sqrt(mean)

    def _store_digits(self, digits: Ptr, first: int, q: Value) -> Value:
        """Stores the digits of a block's numbers from `first`; returns the leading ones."""
        k = self.k

        def right(x: Value, bits: int) -> Value:
            return Value(k, k.builder.ashr(x.ssa, k.like(x, bits).ssa))

        for d in reversed(range(self.digits)):
            digit = right(q << 32 - self.bits, 32 - self.bits) if d else q  # the lowest bits, signed
            at = d * self.digit_bytes
            if self.by_words:
                order = [i + j for i in range(0, q.type.count, 4) for j in (0, 2, 1, 3)]
                (digits + at).as_(I16).store(first, digit.to(I16).shuffle(order))
            else:
                digits.store(at + first, digit.to(I8))
            if d:
                q = right(q - digit, self.bits)
        return q

    def _store_sums(self, sums: Ptr, parts: list[Value], lead: Value, scale: Value) -> None:
        k, kind = self.k, self.kind
        each = [parts[: len(parts) // 2], parts[len(parts) // 2 :]] if kind.halves else [parts]
        totals = [k.sum_lanes(functools.reduce(lambda x, y: x + y, half)) for half in each]
        if self.split:
            leading = k.sum_lanes(lead)
            sums.as_(I32)[0] = (totals[0] - leading * self.leading) * -kind.bias
            sums.as_(I32)[1] = leading * -kind.bias
            return
        if kind.bias:
            for i, total in enumerate(totals):
                sums.as_(I32)[i] = total * -kind.bias
        if kind.has_minimum:
            for i, total in enumerate(totals):
                sums[i + bool(kind.bias)] = scale * total.to(F32)
