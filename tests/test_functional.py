"""The functions that a notebook imports give the engine's and the dense model's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer import functional
from llm_infer.base.errors import UserError
from tests.models.family_checkpoints import FOLDER, dense, load

NAME = "qwen3_window"
PROMPTS = [list(range(3, 24)), list(range(40, 49))]
TABLES = np.arange(1, 9, dtype=np.int32).reshape(2, 4)


def test_prompts_in_chunks_and_single_tokens_give_the_dense_logits() -> None:
    model = load(NAME)
    step = jax.jit(
        lambda params, cache, plan, ids: functional.forward(model, params, cache, plan, ids), donate_argnums=1
    )
    cache = functional.empty_cache(model, 9, page_size=8)
    done = [0, 0]
    for counts in ([13, 8], [8, 1]):  # the first step mixes chunks, the second a chunk with a single token
        ids = [token for prompt, at, count in zip(PROMPTS, done, counts, strict=True) for token in prompt[at:][:count]]
        done = [at + count for at, count in zip(done, counts, strict=True)]
        plan = functional.make_plan(model, counts, done, TABLES, page_size=8)
        logits, cache = step(model.params, cache, plan, jnp.asarray(ids, jnp.int32))
    for found, prompt in zip(logits, PROMPTS, strict=True):
        np.testing.assert_allclose(found, dense(model, prompt)[0][-1], atol=1e-4)


def test_logits_of_all_tokens() -> None:
    model = load(NAME)
    plan = functional.make_plan(model, [9], [9], TABLES[:1], page_size=8)
    cache = functional.empty_cache(model, 9, page_size=8)
    ids = jnp.asarray(PROMPTS[1], jnp.int32)
    logits, _ = functional.forward(model, model.params, cache, plan, ids, all_tokens=True)
    np.testing.assert_allclose(logits, dense(model, PROMPTS[1])[0], atol=1e-4)


def test_a_draw_depends_on_its_own_row() -> None:
    logits = jax.random.normal(jax.random.key(1), (4, 50)) * 3
    keys = jax.random.split(jax.random.key(0), 4)
    temperature, top_k = jnp.array([0.0, 0.7, 1.0, 2.0]), jnp.array([-1, 5, -1, 3])
    together = functional.draw(logits, keys, temperature=temperature, top_k=top_k)
    assert together[0] == logits[0].argmax()
    for row in range(4):
        one = slice(row, row + 1)
        alone = functional.draw(logits[one], keys[one], temperature=temperature[one], top_k=top_k[one])
        assert alone[0] == together[row]


def test_draws_follow_the_distribution() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)
    drawn = functional.draw(logits, jax.random.split(jax.random.key(0), 4000), top_p=0.9)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_a_model_is_loaded_with_defaults() -> None:
    tokenizer, model = functional.load(str(FOLDER / NAME), load_format="dummy", progress=False)
    assert model.config.num_layers == 4 and tokenizer.vocab_size == model.config.vocab_size
    with pytest.raises(UserError, match="num_pages=1"):
        functional.empty_cache(model, 1)
