"""A section of the GPU run: what it is told, what it yields, and how it measures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

Row = dict[str, Any]
Section = Callable[["Setting"], Iterator[Row]]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Setting:
    """Settings of all sections: whether sizes are tiny, and kernels interpreted for want of a GPU."""

    small: bool
    interpret: bool
    deadline: float

    @property
    def seconds_left(self) -> float:
        """The seconds left until the deadline; a section with many rows stops when none is left."""
        return self.deadline - time.monotonic()


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Yields the function's results in order; XLA compiles outside Python's lock, and what it compiles is most of a section."""
    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


def seconds_per_call(call: Callable[[], Any], *, rounds: int = 5, least: float = 0.05) -> float:
    """Returns the fastest round's mean time of a call, in seconds; calls of a round are queued behind each other."""
    jax.block_until_ready(call())
    started = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(1, min(200, int(least / max(time.perf_counter() - started, 1e-6))))
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls - 1):
            call()
        jax.block_until_ready(call())
        best = min(best, (time.perf_counter() - started) / calls)
    return best
