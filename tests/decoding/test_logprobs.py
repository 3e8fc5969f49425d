"""Log-probabilities and the most likely tokens equal those of a full sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.decoding.logprobs import logprobs_of
from pallas_kernels.draw_tokens.top_tokens import top_token, top_tokens


@pytest.mark.parametrize("vocab", [3, 256, 1000])
def test_top_token_equals_argmax(vocab: int) -> None:
    """With ties within and across blocks, impossible tokens, and nothing possible at all."""
    logits = np.random.default_rng(vocab).integers(-3, 3, (40, vocab)).astype(np.float32)
    logits[::2] = -np.inf
    logits[2::4, -2:] = 1.0
    found = jax.jit(top_token)(jnp.asarray(logits))
    np.testing.assert_array_equal(found, logits.argmax(-1))


@pytest.mark.parametrize(("vocab", "count"), [(7, 7), (300, 20), (5000, 20), (5037, 33)])
def test_top_tokens_equal_those_of_a_sort(vocab: int, count: int) -> None:
    logits = np.random.default_rng(vocab).standard_normal((9, vocab)).astype(np.float32)
    logits[1, :] = -np.inf
    logits[1, [2, 5]] = 1.0, 2.0
    logits[2, :-3] = -np.inf  # only the last block holds something
    values, ids = jax.jit(top_tokens, static_argnums=1)(jnp.asarray(logits), count)
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=-1)[:, :count])
    found = np.take_along_axis(logits, np.asarray(ids), axis=1)  # also checks that all ids are within the vocabulary
    np.testing.assert_array_equal(np.where(np.isfinite(values), found, -np.inf), values)


def test_logprobs_of_rows() -> None:
    logits = (np.random.default_rng(0).standard_normal((5, 3000)) * 3).astype(np.float32)
    ids = np.array([0, 2999, 17, 5, 1000], np.int32)
    found = jax.jit(logprobs_of, static_argnums=2)(jnp.asarray(logits), jnp.asarray(ids), 20)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.logprobs, exact[np.arange(5), ids], atol=2e-6)
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-exact, axis=-1)[:, :20], atol=2e-6)
    np.testing.assert_array_equal(found.ranks, 1 + (exact > exact[np.arange(5), ids][:, None]).sum(-1))
