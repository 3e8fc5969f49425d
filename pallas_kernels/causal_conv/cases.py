"""Named cases of causal convolution, shared by the tests of every implementation (numpy only).

Null states and rows of padding are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ConvCase:
    """Sequences of (rows, state read from, state written to, rows that the state takes in), and the sizes of the step."""

    batch: tuple[tuple[int, int, int, int], ...]
    tokens: int
    channels: int = 24
    taps: int = 3
    dtype: str = "float32"


CASES: dict[str, ConvCase] = {
    "decode": ConvCase(((1, 1, 1, 1), (1, 5, 5, 1), (1, 2, 3, 1)), 4),
    "prefill": ConvCase(((7, 0, 4, 7),), 7),
    "chunk": ConvCase(((6, 2, 2, 6), (5, 3, 3, 5)), 16),
    "mixed": ConvCase(((1, 6, 6, 1), (1, 0, 2, 1), (9, 0, 1, 9), (2, 3, 3, 2)), 16),
    "one_token_after_another_state": ConvCase(((1, 1, 2, 1), (1, 1, 3, 1)), 2),
    "proposals": ConvCase(((4, 2, 2, 1), (5, 0, 3, 2), (3, 4, 4, 3)), 16),
    "two_taps": ConvCase(((3, 1, 1, 3), (1, 2, 2, 1)), 8, taps=2),
    "five_taps": ConvCase(((3, 1, 1, 3), (1, 2, 2, 1), (9, 0, 5, 9)), 16, taps=5),
    "bfloat16": ConvCase(((3, 1, 1, 3), (1, 2, 2, 1), (9, 0, 5, 9)), 16, channels=32, dtype="bfloat16"),
    "frozen": ConvCase(((1, 1, 0, 0), (1, 2, 2, 1)), 2),
    "nothing": ConvCase((), 4),
}
LAYERS, LAYER, STATES, SEQUENCES = 2, 1, 8, 5


def build(case: ConvCase, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Makes x [T, E], taps [E, K], states [L, N, K-1, E] and the fields of `StateRows`."""
    import ml_dtypes  # a dependency of jax; gives numpy bfloat16

    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    rng = np.random.default_rng(seed)
    sequences = min(SEQUENCES, case.tokens)
    x = rng.standard_normal((case.tokens, case.channels))
    used = sum(rows for rows, *_ in case.batch)
    x[used:] = np.nan
    states = rng.standard_normal((LAYERS, STATES, case.taps - 1, case.channels))
    states[:, 0] = np.nan
    fields = {name: np.zeros(sequences, np.int32) for name in ("state_from", "state_to", "state_count")}
    counts = np.zeros(sequences, np.int32)
    for index, (rows, source, target, count) in enumerate(case.batch):
        counts[index] = rows
        for name, value in zip(fields, (source, target, count), strict=True):
            fields[name][index] = value
    q_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    taps = rng.standard_normal((case.channels, case.taps))
    return x.astype(dtype), taps.astype(dtype), states.astype(dtype), {"q_start": q_start, **fields}
