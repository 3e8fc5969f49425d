"""Reads the TPU compiler's schedule of a Pallas kernel: the tree of its loops, with bundles and register spills of each.

A bundle is what a TensorCore issues in one cycle, so bundles times trips estimates cycles (without waits for memory).
libtpu dumps the final bundles if LIBTPU_INIT_ARGS has `dump_arguments(...)` before JAX is imported. It was read on libtpu 0.0.42
to 0.0.52; the format is undocumented, so whatever looks different is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)")


def dump_arguments(directory: Path | str) -> str:
    """Returns the value of LIBTPU_INIT_ARGS that makes libtpu dump what `read` reads."""
    return f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"


@dataclass
class Loop:
    """A loop, or the whole kernel. Counts leave out what is in inner loops; a branch counts as if it were taken.

    Attributes:
        bundles: bundles of one trip.
        fills, spills: fills and spills of vector registers in one trip.
        inner: inner loops, in the order of the program.
    """

    depth: int
    bundles: int = 0
    fills: int = 0
    spills: int = 0
    inner: list[Loop] = field(default_factory=list)


def read(directory: Path | str, kernel: str) -> Loop:
    """Reads the loops of the kernel of this name (the `name` of its pallas_call) that was compiled last.

    Raises:
        ValueError: there is no dump of it, or one that cannot be read.
    """
    found = [path for path in Path(directory).glob(f"*{kernel}*-final_bundles.txt") if "analysis" not in path.name]
    usage = list(Path(directory).glob(f"*{kernel}*-final_hlo-static-per-bundle-utilization.txt"))
    if not found or not usage:
        raise ValueError(f"{directory} has no dump of {kernel}: is LIBTPU_INIT_ARGS set before JAX is imported?")
    counts = _register_traffic(max(usage, key=lambda path: path.name).read_text())
    root = Loop(0)
    open_loops, number = [root], 0
    with max(found, key=lambda path: path.name).open() as lines:
        for line in lines:
            match = _BUNDLE.match(line)
            if match is None:
                continue
            mark, depth, rest = match[1], len(match[2]), match[3]
            if mark == "LB":
                while open_loops[-1].depth >= depth:
                    open_loops.pop()
                open_loops[-1].inner.append(Loop(depth))
                open_loops.append(open_loops[-1].inner[-1])
            elif not rest.lstrip().startswith("}"):  # delay slots carry no mark and belong to what is before them
                while open_loops[-1].depth > depth:
                    open_loops.pop()
            if number >= len(counts):
                raise ValueError(f"{kernel}: more bundles than the {len(counts)} whose use was dumped")
            open_loops[-1].bundles += 1
            open_loops[-1].fills += counts[number][0]
            open_loops[-1].spills += counts[number][1]
            number += 1
    if number != len(counts):
        raise ValueError(f"{kernel}: {number} bundles, and the use of {len(counts)}")
    return root


def _register_traffic(text: str) -> list[tuple[int, int]]:
    """Returns (fills, spills) of each bundle."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    fill, spill = names.index("VLOAD:FILL"), names.index("VSTORE:SPILL")
    rows = (line.split() for line in lines[lines.index("== UTILIZATION:") + 1 :] if line.strip())
    return [(int(row[fill]), int(row[spill])) for row in rows]


Trips = Sequence[Any]
"""For each inner loop, (trips per trip of what is around it, Trips of its inner loops)."""


def cycles(loop: Loop, trips: Trips) -> int:
    """Estimates the cycles of one trip of a loop, all inner loops included.

    Raises:
        ValueError: the compiler made other loops than `trips` describes (where a loop runs 0 times, its inner ones may differ).
    """
    return _weighted(loop, trips, lambda one: one.bundles)


def spilled(loop: Loop, trips: Trips) -> int:
    """Returns the fills and spills that one trip of a loop executes, counted as by `cycles`."""
    return _weighted(loop, trips, lambda one: one.fills + one.spills)


def _weighted(loop: Loop, trips: Trips, count: Any) -> int:
    if len(loop.inner) != len(trips):
        shape = describe(loop)
        raise ValueError(f"expected {len(trips)} loops at depth {loop.depth}, found {len(loop.inner)}:\n{shape}")
    total = count(loop)
    for inner, (number, below) in zip(loop.inner, trips, strict=True):
        total += number * _weighted(inner, below, count) if number else 0
    return total


def describe(loop: Loop) -> str:
    """Returns the tree, one line per loop."""
    own = f"{'  ' * loop.depth}{loop.bundles} bundles, {loop.fills} fills, {loop.spills} spills"
    return "\n".join([own, *(describe(inner) for inner in loop.inner)])
