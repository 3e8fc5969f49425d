"""Cuts activations into 8-bit digits for the kernel for tiled rows, in blocks of 32 with a scale each."""

from __future__ import annotations

import functools
import math

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I8, I32, Emitter, Ptr, Value
from pallas_kernels.quant_matmul.cpu_tile_kinds import KINDS
from pallas_kernels.quant_matmul.tiles import TILE_GROUP as GROUP

BLOCK = 32
LARGEST = {1: 127, 2: 127 << 8, 3: 63 << 16}  # so that a block's sum fits 32 bits
INFINITY = 0x7F800000  # its bits
SMALLEST = 1e-30  # blocks of smaller numbers count as zeros: their scale's inverse would overflow


class Activations:
    """Activations block by block: digits [A, G, S, digits, 32], scales [A, G, S] and sums [A, G, S, 2].

    A sum is that of the block's numbers, or of half of them. Where weights have a bias, the first sum is a whole number, in units
    of the scale and times -bias (where `split`, the first is that of all digits but the leading one, the second that of it);
    where they have minima, the last is a float32.
    """

    def __init__(self, k: Emitter, a: Frame, kind: str, digits: int, gated: bool) -> None:
        self.k, self.a, self.kind, self.digits, self.gated = k, a, KINDS[kind], digits, gated
        self.split = self.kind.most > 127 and digits == 3  # 8-bit weights times 23 bits do not fit 32

    def at(self, group: Value, block: Value) -> tuple[Ptr, Ptr, Ptr]:
        """Returns digits, scales and sums of one block of a group."""
        index = (group * self.a.G + block) * self.a.S
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
