"""Measures an engine with llama.cpp's interface of batches, in which each row names its position and sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from reporting import report_all  # pyright: ignore[reportMissingImports]

CHUNK = 512
STEPS = 48


def measure(
    version: str,
    batch: Any,
    open_context: Callable[[int, int], Any],
    compute: Callable[[Any, Any], int],
    clear: Callable[[Any], None],
    close: Callable[[Any], None],
    depths: Sequence[int],
) -> None:
    """Prints all figures.

    Args:
        version: the engine's.
        batch: a `llama_batch` with room for `CHUNK` rows.
        open_context: makes a context for so many tokens of so many sequences.
        compute: runs a batch in a context to its end; returns 0 if it could.
        clear: empties a context's cache.
        close: frees a context.
        depths: of the measurements at depth.
    """
    rng = np.random.default_rng(0)

    def step(context: Any, rows: Sequence[tuple[int, int, bool]]) -> float:
        """Returns the seconds for one batch of (position, sequence, wants logits)."""
        batch.n_tokens = len(rows)
        for i, (position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = int(rng.integers(10, 1000)), position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, logits
        started = time.perf_counter()
        if compute(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return time.perf_counter() - started

    def prompt(context: Any, length: int, sequence: int) -> float:
        rows = [(i, sequence, i == length - 1) for i in range(length)]
        return sum(step(context, rows[first : first + CHUNK]) for first in range(0, length, CHUNK))

    def prefill(length: int) -> float:
        context, times = open_context(2 * length, 1), []
        try:
            for _ in range(3):
                clear(context)
                times.append(prompt(context, length, 0))
        finally:
            close(context)
        return length / min(times)

    def decode(size: int, length: int) -> float:
        context = open_context((length + STEPS) * size + 64, size)
        try:
            for sequence in range(size):
                prompt(context, length, sequence)
            rows = ([(length + i, sequence, True) for sequence in range(size)] for i in range(STEPS))
            return size / statistics.median(step(context, each) for each in rows)
        finally:
            close(context)

    report_all(version, "weights as in the file, cache in float16", prefill, decode, depths)
