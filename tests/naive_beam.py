"""Beam search written down literally over a function that gives all log-probabilities; nothing in it is efficient.

It follows the published behaviour of transformers' `generate(num_beams=…)`: (ends + 1) × width candidates a step, finished
ones only from among the best `width`, and its three rules of early stopping.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Scores = Callable[[list[int]], np.ndarray]
"""Log-probabilities [V] of the token after these."""


def naive_beam_search(
    scores: Scores,
    prompt: list[int],
    *,
    width: int,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> list[tuple[float, list[int]]]:
    """(score, new tokens) of the `width` results, best first."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, max_tokens + 1):
        candidates = []
        for total, output in running:
            row = np.array(scores(prompt + output), np.float64)
            if length < min_tokens:
                row[list(stop_ids)] = -np.inf
            candidates += [(total + row[token], [*output, token]) for token in range(len(row))]
        candidates.sort(key=lambda pair: -pair[0])
        candidates = candidates[: max(2, 1 + len(stop_ids)) * width]
        ended = [length == max_tokens or output[-1] in stop_ids for _, output in candidates]
        for rank, ((total, output), end) in enumerate(zip(candidates, ended, strict=True)):
            if end and rank < width:
                finished.append((total / length**length_penalty, output))
        finished = sorted(finished, key=lambda pair: -pair[0])[:width]
        running = [pair for pair, end in zip(candidates, ended, strict=True) if not end][:width]
        if not running:
            break
        if len(finished) == width:
            if early_stopping is True:
                break
            best = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            if running[0][0] / best**length_penalty <= finished[-1][0]:
                break
    return finished
