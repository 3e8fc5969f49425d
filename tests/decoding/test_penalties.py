"""Penalties, biases, masks and limits equal transformers' processors and their definitions."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.decoding.penalties import (
    PenaltyRows,
    PenaltyState,
    count_drawn,
    empty_penalties,
    mask_logits,
    penalised,
    seen_counts,
    set_slot,
)
from llm_infer.decoding.token_rules import TokenRules, mask_words
from pallas_kernels.draw_tokens import Limits
from pallas_kernels.draw_tokens.xla import kept_tokens, scale

GOLDENS = np.load(Path(__file__).parent.parent / "goldens" / "processors.npz")
LOGITS = GOLDENS["logits"]
ROWS, VOCAB = LOGITS.shape
SLOT = jnp.arange(ROWS, dtype=jnp.int32)
NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "typical_p": 1.0}
LIMITS = {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.7}


def limits(**values: float) -> Limits:
    chosen = NEUTRAL | {"temperature": 1.0} | values
    kinds = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in Limits._fields}
    return Limits(**{name: jnp.full(ROWS, chosen[name], kind) for name, kind in kinds.items()})


def penalties(repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0, bias: int = 0) -> PenaltyRows:
    return PenaltyRows(
        *(jnp.full(ROWS, x, jnp.float32) for x in (repetition, presence, frequency)), jnp.full(ROWS, bias)
    )


def state_of(prompts: list[list[int]], outputs: list[list[int]]) -> PenaltyState:
    state = empty_penalties(ROWS + 1, VOCAB)
    for slot, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        bias = np.zeros(VOCAB, np.float32)
        bias[slot] = 5.0
        state = jax.jit(set_slot)(state, np.int32(slot), seen_counts(prompt, output, VOCAB), bias)
    return state


def apply(logits: jax.Array, names: list[str]) -> np.ndarray:
    rows = limits(**{name: LIMITS[name] for name in names})
    kept = jax.jit(kept_tokens)(scale(logits, rows), rows)
    return np.asarray(jnp.where(kept, logits, -jnp.inf))


@pytest.mark.parametrize("name", list(LIMITS))
def test_limits_equal_transformers(name: str) -> None:
    np.testing.assert_allclose(apply(jnp.asarray(LOGITS), [name]), GOLDENS[name], atol=1e-5)


def test_repetition_penalty_and_everything_together_equal_transformers() -> None:
    seen = GOLDENS["seen"].tolist()
    # What the prompt and what the output brought counts alike.
    state = state_of([row[:5] for row in seen], [row[5:] for row in seen])
    shaped = jax.jit(penalised)(jnp.asarray(LOGITS), state, SLOT, penalties(1.3))
    np.testing.assert_allclose(shaped, GOLDENS["repetition"], atol=1e-5)
    np.testing.assert_allclose(apply(shaped, list(LIMITS)), GOLDENS["all"], atol=1e-5)


def test_presence_and_frequency_count_the_output_alone() -> None:
    state = state_of([[3, 4]] * ROWS, [[7, 7, 8]] * ROWS)
    state = count_drawn(state, SLOT, jnp.full(ROWS, 8, jnp.int32))
    shaped = np.asarray(penalised(jnp.asarray(LOGITS), state, SLOT, penalties(1.0, 0.5, 0.25, bias=1)))
    expected = LOGITS.copy()
    expected[:, [7, 8]] -= 0.5 + 0.25 * 2
    expected[np.arange(ROWS), np.arange(ROWS)] += 5.0
    np.testing.assert_allclose(shaped, expected, atol=1e-6)


def test_masks_of_token_rules() -> None:
    rules = TokenRules(
        VOCAB, allowed=[0, 31, 32, 699, 5, 6], bad_words=[(6,), (31, 5)], min_tokens=2, stop_ids=frozenset({32})
    )
    expected = {(): {0, 5, 31, 699}, (1,): {0, 5, 31, 699}, (0, 1): {0, 5, 31, 32, 699}, (0, 31): {0, 31, 32, 699}}
    for output, tokens in expected.items():
        mask = np.zeros((ROWS, mask_words(VOCAB)), np.int32)
        assert all(rules.fill(row, len(output), output, None) is None for row in mask)
        masked = np.asarray(mask_logits(jnp.asarray(LOGITS), jnp.asarray(mask)))
        assert all(set(np.flatnonzero(row > -np.inf)) == tokens for row in masked)


def test_rules_that_leave_no_token_say_which_of_them_to_change() -> None:
    mask = np.zeros(mask_words(VOCAB), np.int32)
    nothing = TokenRules(VOCAB, allowed=[699], bad_words=[(699,)])
    said = "allowed_token_ids and bad_words leave no token to draw: allow more tokens or drop some of bad_words"
    assert nothing.why_nothing_starts == said
    later = TokenRules(VOCAB, allowed=[7], bad_words=[(7, 7)])
    assert later.why_nothing_starts is None and later.fill(mask, 1, [7], None) == said
    ends = TokenRules(VOCAB, allowed=[3, 4], min_tokens=2, stop_ids=frozenset({3, 4, 5}))
    why = ends.why_nothing_starts
    assert why is not None and "allowed_token_ids and min_tokens=2" in why and "lower min_tokens" in why
    assert "bad_words" not in why
    assert ends.fill(mask, 2, [3, 3], None) is None
    assert TokenRules(VOCAB, allowed=[3, 9], min_tokens=2, stop_ids=frozenset({3})).why_nothing_starts is None
