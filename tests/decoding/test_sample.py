"""The sampler draws from the distributions that temperature, top-k and top-p define, row by row and repeatably."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.decoding.sample import SamplingRows, kept_tokens, sample

ROWS, VOCAB = 2048, 300
SAMPLE = jax.jit(sample)


def make_rows(
    temperature: float | np.ndarray, top_p: float = 1.0, top_k: int = -1, seed: int = 7, first: int = 0
) -> SamplingRows:
    def fill(value: object, dtype: type) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), ROWS))

    return SamplingRows(
        temperature=fill(temperature, np.float32),
        top_p=fill(top_p, np.float32),
        top_k=fill(top_k, np.int32),
        seed_high=fill(seed >> 32, np.int32),
        seed_low=fill(seed & 0x7FFFFFFF, np.int32),
        sample_index=fill(0, np.int32),
        position=jnp.arange(first, first + ROWS, dtype=jnp.int32),
    )


def distribution(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Probabilities by sorting, in float64: the definition, independent of the sampler's bisection."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k if top_k > 0 else None]
    mass = np.exp(scaled[order] - scaled.max())
    mass /= mass.sum()
    count = int(np.searchsorted(np.cumsum(mass), top_p - 1e-12)) + 1
    result = np.zeros(len(logits))
    result[order[:count]] = mass[:count] / mass[:count].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, -1), (0.5, 1.0, -1), (1.0, 0.6, -1), (1.0, 1.0, 10), (1.5, 0.8, 25), (1.0, 1.0, 1), (1.0, 0.01, -1)],
)
def test_frequencies_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    logits = (np.random.default_rng(1).standard_normal(VOCAB) * 2).astype(np.float32)
    expected = distribution(logits, temperature, top_p, top_k)
    batch = jnp.asarray(np.tile(logits, (ROWS, 1)))
    draws = [SAMPLE(batch, make_rows(temperature, top_p, top_k, first=i * ROWS)) for i in range(8)]
    counts = np.bincount(np.concatenate(draws), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Merge rare tokens so that every cell expects at least 8 draws; then chi-square at a one in ten thousand level.
    order = np.argsort(expected)
    cells = np.minimum(np.cumsum(expected[order]) * counts.sum() // 8, 1e9).astype(int)
    observed = np.bincount(np.unique(cells, return_inverse=True)[1], weights=counts[order])
    wanted = np.bincount(np.unique(cells, return_inverse=True)[1], weights=expected[order]) * counts.sum()
    keep = wanted > 1
    statistic = float((((observed - wanted) ** 2)[keep] / wanted[keep]).sum())
    freedom = int(keep.sum()) - 1
    # Wilson-Hilferty: (χ²/k)^(1/3) is nearly normal with mean 1 − 2/9k and variance 2/9k.
    z = (
        0.0
        if freedom < 1
        else ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    )
    assert z < 3.9, f"chi-square {statistic:.1f} at {freedom} degrees of freedom"


def test_kept_sets_equal_those_of_a_sort() -> None:
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((ROWS, VOCAB)) * 3).astype(np.float32)
    kept = np.asarray(jax.jit(kept_tokens)(jnp.asarray(logits), make_rows(1.0, 0.85, 40)))
    for row in range(0, ROWS, 16):
        np.testing.assert_array_equal(kept[row], distribution(logits[row], 1.0, 0.85, 40) > 0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((ROWS, VOCAB)).astype(np.float32)
    mixed = np.where(np.arange(ROWS) % 3 == 0, 0.0, 1.0).astype(np.float32)
    together = np.asarray(SAMPLE(jnp.asarray(logits), make_rows(mixed, 0.9, 50)))
    alone = np.asarray(SAMPLE(jnp.asarray(logits), make_rows(1.0, 0.9, 50)))
    drawn = mixed > 0
    np.testing.assert_array_equal(together[drawn], alone[drawn])
    np.testing.assert_array_equal(together[~drawn], logits[~drawn].argmax(-1))
    shuffled = np.asarray(SAMPLE(jnp.asarray(logits), make_rows(1.0, 0.9, 50, seed=8)))
    assert (shuffled != alone).mean() > 0.3


def test_infinite_logits_are_never_drawn() -> None:
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[:, [3, 200]] = 0.0
    drawn = np.asarray(SAMPLE(jnp.asarray(logits), make_rows(1.0)))
    assert set(np.unique(drawn)) == {3, 200}
