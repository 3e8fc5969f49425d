"""Reads from a compiled program's text what it does: collectives, large copies, the compiler's cycles; loops count fully."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"([a-z]+)(\d+)?\w*\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NEAR = "S(1)"
"""Marks arrays in a TPU's own scratch memory: a copy into it, or out, is how data is read anyway."""
_UNKNOWN = 1 << 62
"""Cycles from here on stand for "not known"."""


@dataclass(slots=True)
class Work:
    """Work of a program in one run.

    Attributes:
        collectives: number of runs of each kind; an asynchronous one counts at its start.
        cycles: sum of the compiler's estimates; 0 where it gives none. For a conditional, the cheapest branch counts.
        copies: bytes of each copy within device memory.
    """

    collectives: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    copies: list[int] = field(default_factory=list)

    def add(self, other: Work, times: int = 1) -> None:
        """Adds what another part does, `times` times; each copy is listed once."""
        self.cycles += times * other.cycles
        self.copies += other.copies
        for kind, count in other.collectives.items():
            self.collectives[kind] += times * count


def read_work(text: str) -> Work:
    """Returns the work of a compiled program's entry computation.

    Loops count as often as they run where the bound is a constant of their condition, and once where it is dynamic.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if (found := _COMPUTATION.match(line)) and not line.startswith(" "):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name:
            computations[name].append(line)
    done: dict[str, Work] = {}

    def work_of(computation: str) -> Work:
        if computation not in done:
            done[computation] = total = Work()
            for line in computations[computation]:
                if found := _INSTRUCTION.match(line):
                    add_instruction(total, line, found[1], found[2])
        return done[computation]

    def add_instruction(total: Work, line: str, shape: str, op: str) -> None:
        if (cycles := _CYCLES.search(line)) and int(cycles[1]) < _UNKNOWN:
            total.cycles += int(cycles[1])
        kind = op.removesuffix("-start")
        if kind in COLLECTIVES:
            total.collectives[kind] += 1
        elif kind == "copy" and _NEAR not in shape:
            total.copies.append(array_bytes(shape))
        elif op == "while":
            total.add(work_of(_called(line, "body")[0]), _trips(computations[_called(line, "condition")[0]]))
        elif op == "conditional":
            names = _called(line, "branch_computations") or _called(line, "(?:true|false)_computation")
            total.add(min(map(work_of, names), key=lambda work: work.cycles))
        # The last two: work on a TPU7x's SparseCore, as older and newer compilers write it.
        elif op in ("call", "async-start", "call-start", "custom-call-start"):
            for attribute in ("to_apply", "calls", "called_computations"):
                for called in _called(line, attribute):
                    total.add(work_of(called))

    return work_of(entry)


def _called(line: str, attribute: str) -> list[str]:
    """Returns the names of computations that an attribute of an instruction holds."""
    found = re.findall(rf"[ ,]{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", line)
    return [name.strip().lstrip("%") for each in found for name in each.strip("{}").split(",")]


def _trips(condition: list[str]) -> int:
    """Returns the constant that a loop's condition compares with; 1 where there is none."""
    constants = [int(each) for line in condition for each in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)]
    return max(constants, default=1)


def array_bytes(shape: str) -> int:
    """Returns the bytes of the largest array in the text of a shape, such as "(u8[30,8,20]{2,1,0}, s32[])"."""
    return max((_bytes(*each.groups()) for each in _SHAPE.finditer(shape)), default=0)


def _bytes(kind: str, bits: str | None, sizes: str) -> int:
    width = 8 if bits is None or kind == "pred" else int(bits)
    return math.prod(int(size) for size in sizes.split(",") if size) * width // 8
