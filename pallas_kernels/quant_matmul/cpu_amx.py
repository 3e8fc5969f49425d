"""Dot products of bytes by AMX (Intel, from Sapphire Rapids on): one instruction takes 16 rows of weights and of activations.

A tile register has 16 rows of 64 bytes. The kernel's columns, four weights of 16 rows each, are the rows that the instruction
wants of its second operand (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18). Sums are the
same 32-bit numbers as those of other instructions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.emit import I8, I16, I32, Emitter, Ptr, Value

AMX_ROWS = 16
"""Rows of activations of a product."""
KEPT_TILES = 16
"""Most tiles of sums (1 KB each) that wait: with weights and activations they stay in the L1 cache."""
MOST_RUNS = 8
"""Most runs that are under way: as many as a block has of the kinds with scales that are kept."""
_A, _B = 6, 7  # registers of activations and weights; sums have those from 0
_SUMS = AMX_ROWS * AMX_ROWS
_ROW_BYTES = 64


def has_amx(k: Emitter, rows: int) -> bool:
    """Checks whether the target multiplies tiles of bytes, for vectors of so many weight rows."""
    return rows == AMX_ROWS and k.target.has("amx-int8") and k.target.has("amx-tile")


class TileProducts:
    """Products of 16 rows of activations with runs of 32 weights of 16 rows, in `halves` sums of each digit."""

    def __init__(self, k: Emitter, digits: int, halves: int) -> None:
        self.k, self.digits, self.halves = k, digits, halves
        self.runs = min(MOST_RUNS, 1 << (KEPT_TILES // (digits * halves)).bit_length() - 1)
        self.columns = 8 // halves
        self.weights = k.scratch(I8, self.runs * 8 * _ROW_BYTES)
        self.results = k.scratch(I32, self.runs * digits * halves * _SUMS)

    def configure(self) -> None:
        """Gives this thread's tile registers their shapes; `release` ends that."""
        k = self.k
        config = k.scratch(I8, _ROW_BYTES)
        config.store(0, k.zeros(I8, _ROW_BYTES))
        config[0] = k.const(I8, 1)  # the only palette
        width = 4 * self.columns
        shapes = {
            **dict.fromkeys(range(6), (AMX_ROWS, _ROW_BYTES)),
            _A: (AMX_ROWS, width),
            _B: (self.columns, _ROW_BYTES),
        }
        for register, (rows, row_bytes) in shapes.items():
            config.as_(I16)[8 + register] = k.const(I16, row_bytes)
            config[48 + register] = k.const(I8, rows)
        self._call("ldtilecfg", config.ssa)

    def release(self) -> None:
        self._call("tilerelease")

    def keep(self, columns: Iterable[Value], run: Value) -> None:
        """Keeps a run's weights under its number (less than `runs`): eight vectors of four unsigned bytes of each row.

        What was stored just now makes `multiply` wait, so other runs are kept in between.
        """
        for i, column in enumerate(columns):
            self._weights(run).store(i * _ROW_BYTES, column)

    def multiply(self, digits: Ptr, stride: Value | int, run: Value) -> None:
        """Computes the sums of a run that was kept, with a block of activations.

        Args:
            digits: signed, 32 bytes of a row's first digit, then of the next one.
            stride: bytes from a row of activations to the next.
            run: the run's number, under which its sums are kept, too.
        """
        k, step = self.k, self.k.index(stride)
        weights, results = self._weights(run), self._results(run)
        for half in range(self.halves):
            place = weights + half * self.columns * _ROW_BYTES
            self._call("tileloadd64", I8(_B), place.ssa, k.index(_ROW_BYTES))
            for digit in range(self.digits):
                number = half * self.digits + digit
                self._call("tilezero", I8(number))
                self._call("tileloadd64", I8(_A), (digits + (digit * 32 + half * 4 * self.columns)).ssa, step)
                self._call("tdpbsud", I8(number), I8(_A), I8(_B))
                self._call("tilestored64", I8(number), (results + number * _SUMS).ssa, k.index(_ROW_BYTES))

    def sums(self, run: Value, first: int, count: int, done: list[Value]) -> list[list[list[Value]]]:
        """Returns [row of activations from `first`][half][digit]: int32 sums of each row of weights, read after `done`."""
        results = self._results(run).after(*done)
        places = [[(half * self.digits + d) * _SUMS for d in range(self.digits)] for half in range(self.halves)]
        return [
            [[results.load(at + row * AMX_ROWS, AMX_ROWS) for at in digits] for digits in places]
            for row in range(first, first + count)
        ]

    def _weights(self, run: Value) -> Ptr:
        return self.weights + run * (8 * _ROW_BYTES)

    def _results(self, run: Value) -> Ptr:
        return self.results + run * (self.halves * self.digits * _SUMS)

    def _call(self, name: str, *arguments: Any) -> None:
        self.k.intrinsic(f"llvm.x86.{name}", ir.VoidType(), arguments)
