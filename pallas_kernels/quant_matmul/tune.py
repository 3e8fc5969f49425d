"""Measures on this machine for how many activation rows each way of multiplying with stored weights is the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import cpu, xla
from pallas_kernels.quant_matmul.cases import random_blocks, random_rows
from pallas_kernels.quant_matmul.formats import FORMATS

ROWS = (1, 2, 4, 8, 32, 128)
FEATURES, WIDTH, LAYERS = 1536, 768, 2
REPEATS = 5
MARGIN = 0.95
"""A kernel must take at most this share of the other's time to replace it, as measurements are noisy."""


def measure_kinds(kinds: tuple[str, ...] = tuple(FORMATS)) -> Iterator[tuple[str, dict[str, int | None]]]:
    """Yields each kind with its crossovers, see `pallas_kernels.tuned`."""
    for kind in kinds:
        times = {rows: _times(kind, rows) for rows in ROWS}
        crossovers = {"native_rows": _last_win({rows: (t["native"] * MARGIN, t["xla"]) for rows, t in times.items()})}
        if kind in cpu.INT8_KINDS:
            crossovers["int8_rows"] = _last_win({rows: (t["int8"], t["native"] * MARGIN) for rows, t in times.items()})
        yield kind, crossovers


def _last_win(times: dict[int, tuple[float, float]]) -> int | None:
    """Returns the most rows up to which the first time is always the smaller; None where it is for all."""
    last = 0
    for rows, (first, second) in times.items():
        if first > second:
            return last
        last = rows
    return None


def _times(kind: str, rows: int) -> dict[str, float]:
    """Returns the seconds of one call of each way, the least of a few turns through all of them."""
    blocks = jnp.asarray(random_blocks(kind, LAYERS, FEATURES, WIDTH))
    x = jnp.asarray(random_rows(rows, WIDTH))
    ways: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
        "native": lambda x, b, i: cpu.matmul_kernel(kind)(x, b, i)[0],
        "xla": lambda x, b, i: xla.quant_matmul(x, b, i, kind=kind),
    }
    if kind in cpu.INT8_KINDS:
        ways["int8"] = lambda x, b, i: cpu.int8_kernel(kind)(x, b, i, dims={"G": WIDTH // 32})[0]
    programs = {name: jax.jit(way) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(REPEATS + 1):
        for name, program in programs.items():
            layer = jnp.int32(turn % LAYERS)
            started = time.perf_counter()
            program(x, blocks, layer).block_until_ready()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}
