"""What the sampling parameters mean: probabilities by sorting, in float64."""

from __future__ import annotations

import numpy as np


def distribution(
    logits: np.ndarray, temperature: float, top_p: float, top_k: int, min_p: float = 0.0, typical_p: float = 1.0
) -> np.ndarray:
    """Probability of each token of logits [V]; independent of the sampler's bisection."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k if top_k > 0 else None]
    mass = np.exp(scaled[order] - scaled.max())
    mass /= mass.sum()
    count = int(np.searchsorted(np.cumsum(mass), top_p - 1e-12)) + 1
    mass[count:] = 0.0
    mass[mass < min_p * mass[0]] = 0.0
    mass /= mass.sum()
    information = -np.log(np.where(mass > 0, mass, 1.0))
    distance = np.where(mass > 0, np.abs(information - (mass * information).sum()), np.inf)
    nearest = np.argsort(distance, kind="stable")
    kept = int(np.searchsorted(np.cumsum(mass[nearest]), typical_p - 1e-12)) + 1
    mass[nearest[kept:]] = 0.0
    result = np.zeros(len(logits))
    result[order] = mass / mass.sum()
    return result
