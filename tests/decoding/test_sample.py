"""The sampler draws from the distributions that temperature, top-k and top-p define, row by row and repeatably."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.decoding.penalties import PenaltyRows, empty_penalties, mask_logits, penalised, seen_counts, set_slot
from llm_infer.decoding.sample import SamplingRows, sample
from llm_infer.decoding.token_rules import ALL, TokenRules, mask_words
from pallas_kernels import cpu_ffi, dispatch
from tests.decoding.distribution import distribution

ROWS, VOCAB = 2048, 300
SAMPLERS = {name: jax.jit(lambda logits, rows: sample(logits, rows)) for name in ("cpu", "xla")}


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., jax.Array]:
    """The jitted sampler with each implementation of the draw."""
    if request.param == "cpu" and (reason := cpu_ffi.why_not()):
        pytest.skip(reason)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, f"draw_tokens={request.param}")
    return SAMPLERS[request.param]


def make_rows(
    temperature: float | np.ndarray,
    top_p: float = 1.0,
    top_k: int | np.ndarray = -1,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    *,
    seed: int = 7,
    first: int = 0,
) -> SamplingRows:
    def fill(value: object, dtype: type) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), ROWS))

    return SamplingRows(
        temperature=fill(temperature, np.float32),
        top_p=fill(top_p, np.float32),
        top_k=fill(top_k, np.int32),
        min_p=fill(min_p, np.float32),
        typical_p=fill(typical_p, np.float32),
        seed_high=fill(seed >> 32, np.int32),
        seed_low=fill(seed & 0x7FFFFFFF, np.int32),
        sample_index=fill(0, np.int32),
        position=jnp.arange(first, first + ROWS, dtype=jnp.int32),
    )


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p", "typical_p"),
    [
        (1.0, 1.0, -1, 0.0, 1.0),
        (0.5, 1.0, -1, 0.0, 1.0),
        (1.0, 0.6, -1, 0.0, 1.0),
        (1.0, 0.98, -1, 0.0, 1.0),  # more than the candidates
        (1.0, 1.0, 10, 0.0, 1.0),
        (1.0, 1.0, 100, 0.0, 1.0),  # more than the candidates
        (1.5, 0.8, 25, 0.0, 1.0),
        (1.5, 0.8, 150, 0.0, 1.0),  # top-p of more than the candidates, which may leave fewer
        (1.0, 1.0, 1, 0.0, 1.0),
        (1.0, 0.01, -1, 0.0, 1.0),
        (1.0, 1.0, -1, 0.1, 1.0),
        (1.5, 1.0, -1, 0.02, 1.0),
        (1.0, 1.0, -1, 0.0, 0.5),
        (0.9, 0.9, 40, 0.05, 0.8),
    ],
)
def test_frequencies_follow_the_distribution(
    sampler: Callable[..., jax.Array], temperature: float, top_p: float, top_k: int, min_p: float, typical_p: float
) -> None:
    logits = (np.random.default_rng(1).standard_normal(VOCAB) * 2).astype(np.float32)
    rules = (temperature, top_p, top_k, min_p, typical_p)
    expected = distribution(logits, *rules)
    batch = jnp.asarray(np.tile(logits, (ROWS, 1)))
    draws = [sampler(batch, make_rows(*rules, first=i * ROWS)) for i in range(8)]
    check_frequencies(np.bincount(np.concatenate(draws), minlength=VOCAB), expected)


SHAPES = {
    "repetition_penalty": 1.8,
    "presence_penalty": 1.5,
    "frequency_penalty": 0.7,
    "logit_bias": {3: 2.5, 120: -1.5, 77: 4.0},
    "allowed_token_ids": range(0, VOCAB, 3),
}


@pytest.mark.parametrize("names", [*((name,) for name in SHAPES), tuple(SHAPES)], ids=str)
def test_frequencies_follow_penalties_biases_and_masks(names: tuple[str, ...]) -> None:
    """Against their definitions in float64: repetition, then frequency and presence, then bias, then the mask."""
    chosen = {name: SHAPES[name] for name in names}
    logits = (np.random.default_rng(6).standard_normal(VOCAB) * 2).astype(np.float32)
    best = np.argsort(-logits).tolist()
    prompt, output = [*best[:5], 9], [*best[2:9:2], best[0], 4, 4, 4]
    shaped = logits.astype(np.float64)
    seen = np.zeros(VOCAB, bool)
    seen[[*prompt, *output]] = True
    penalty = chosen.get("repetition_penalty", 1.0)
    shaped[seen] = np.where(shaped[seen] > 0, shaped[seen] / penalty, shaped[seen] * penalty)
    for token in output:
        shaped[token] -= chosen.get("frequency_penalty", 0.0)
    shaped[sorted(set(output))] -= chosen.get("presence_penalty", 0.0)
    bias = np.zeros(VOCAB, np.float32)
    for token, value in chosen.get("logit_bias", {}).items():
        shaped[token] += value
        bias[token] = value
    mask = np.full(mask_words(VOCAB), ALL)
    if (allowed := chosen.get("allowed_token_ids")) is not None:
        shaped[np.setdiff1d(np.arange(VOCAB), allowed)] = -np.inf
        assert TokenRules(VOCAB, allowed=allowed).fill(mask, 0, [], None) is None
    expected = np.exp(shaped - shaped.max())
    expected /= expected.sum()

    state = set_slot(
        empty_penalties(1, VOCAB), jnp.int32(0), jnp.asarray(seen_counts(prompt, output, VOCAB)), jnp.asarray(bias)
    )
    full = [
        jnp.full(ROWS, chosen.get(name, 1.0 * (name == "repetition_penalty")), jnp.float32)
        for name in PenaltyRows._fields[:3]
    ]
    rows = PenaltyRows(*full, jnp.full(ROWS, "logit_bias" in chosen, jnp.int32))

    @jax.jit
    def draw(first: jax.Array) -> jax.Array:
        batch = jnp.broadcast_to(jnp.asarray(logits), (ROWS, VOCAB))
        batch = penalised(batch, state, jnp.zeros(ROWS, jnp.int32), rows)
        batch = mask_logits(batch, jnp.broadcast_to(jnp.asarray(mask), (ROWS, len(mask))))
        drawn = make_rows(1.0, seed=11)
        return sample(batch, drawn._replace(position=drawn.position + first))

    counts = np.bincount(np.concatenate([draw(jnp.int32(i * ROWS)) for i in range(8)]), minlength=VOCAB)
    check_frequencies(counts, expected)
    plain = np.exp(logits.astype(np.float64) - logits.max())
    with pytest.raises(AssertionError):  # the parameter makes a difference that so many draws show
        check_frequencies(counts, plain / plain.sum())


def check_frequencies(counts: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square of draws against probabilities."""
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


def test_a_row_does_not_depend_on_its_neighbours(sampler: Callable[..., jax.Array]) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((ROWS, VOCAB)).astype(np.float32)
    mixed = np.where(np.arange(ROWS) % 3 == 0, 0.0, 1.0).astype(np.float32)
    together = np.asarray(sampler(jnp.asarray(logits), make_rows(mixed, 0.9, 50)))
    alone = np.asarray(sampler(jnp.asarray(logits), make_rows(1.0, 0.9, 50)))
    drawn = mixed > 0
    np.testing.assert_array_equal(together[drawn], alone[drawn])
    np.testing.assert_array_equal(together[~drawn], logits[~drawn].argmax(-1))
    shuffled = np.asarray(sampler(jnp.asarray(logits), make_rows(1.0, 0.9, 50, seed=8)))
    assert (shuffled != alone).mean() > 0.3


def test_a_row_that_needs_the_whole_vocabulary_changes_no_other(sampler: Callable[..., jax.Array]) -> None:
    logits = jnp.asarray(np.random.default_rng(4).standard_normal((ROWS, VOCAB)).astype(np.float32))
    limits = np.where(np.arange(ROWS) % 2 == 0, 20, 200).astype(np.int32)
    mixed, narrow = (np.asarray(sampler(logits, make_rows(1.0, 1.0, top_k))) for top_k in (limits, 20))
    np.testing.assert_array_equal(mixed[::2], narrow[::2])


def test_infinite_logits_are_never_drawn(sampler: Callable[..., jax.Array]) -> None:
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[:, [3, 200]] = 0.0
    drawn = np.asarray(sampler(jnp.asarray(logits), make_rows(1.0)))
    assert set(np.unique(drawn)) == {3, 200}


def test_greedy_rows_take_the_first_of_equal_logits_in_every_company(sampler: Callable[..., jax.Array]) -> None:
    logits = np.random.default_rng(5).integers(0, 4, (10, 20_000)).astype(np.float32)
    for temperatures in (np.zeros(ROWS), np.arange(ROWS) % 2):
        rows = SamplingRows(*(values[:10] for values in make_rows(temperatures)))
        found = np.asarray(sampler(jnp.asarray(logits), rows))
        greedy = temperatures[:10] == 0
        np.testing.assert_array_equal(found[greedy], logits.argmax(-1)[greedy])
