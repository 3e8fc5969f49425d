"""Rows with all kinds of limits, on which implementations of draw_tokens must agree."""

from __future__ import annotations

import numpy as np

from pallas_kernels.draw_tokens.limits import CANDIDATES, Limits


def make_limits(rows: int, **values: float | list[float] | np.ndarray) -> Limits:
    """Returns the limits of `rows` rows in NumPy; those that are not given limit nothing."""
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "typical_p": 1.0} | values
    kinds = {name: np.int32 if name == "top_k" else np.float32 for name in Limits._fields}
    return Limits(**{n: np.broadcast_to(np.asarray(values[n], kinds[n]), rows) for n in kinds})  # type: ignore[arg-type]


def random_limits(rng: np.random.Generator, rows: int, vocab: int) -> Limits:
    """Returns limits of which each row has some and not others, from hardly any to very strong."""

    def some(values: list[float], neutral: float) -> np.ndarray:
        return np.where(rng.random(rows) < 0.5, rng.choice(values, rows), neutral)

    return make_limits(
        rows,
        temperature=some([0.0, 0.3, 0.8, 2.0, 30.0], 1.0),
        top_p=some([1e-6, 0.3, 0.8, 0.95, 0.9999], 1.0),
        top_k=some([1, 2, 40, CANDIDATES - 1, CANDIDATES, CANDIDATES + 1, 500, vocab + 1], -1),
        min_p=some([1e-9, 0.01, 0.2, 1.0], 0.0),
        typical_p=some([0.05, 0.5, 0.9], 1.0),
    )


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Returns flat rows and steep ones, a tenth of the tokens with -inf; the first quarter of the rows has ties."""
    logits = (rng.standard_normal((rows, vocab)) * rng.choice([0.1, 1, 4], (rows, 1))).astype(np.float32)
    logits[:, 1:][rng.random((rows, vocab - 1)) < 0.1] = -np.inf
    logits[: rows // 4] = np.round(logits[: rows // 4])
    return logits
