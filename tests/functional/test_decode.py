"""decode_step: the engine's tokens from a loop that is jitted whole, ragged prompts, batches of batches, and full caches."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.base.errors import UserError
from llm_infer.functional import Cache, LoadedModel, decode_step, draw, forward, load_model, make_cache, sampling_logits
from tests.models.family_checkpoints import FOLDER, load

PROMPTS = [list(range(3, 24)), list(range(40, 49))]
LENGTHS = np.array([len(prompt) for prompt in PROMPTS], np.int32)


def padded() -> np.ndarray:
    ids = np.zeros((2, LENGTHS.max()), np.int32)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    return ids


@pytest.mark.parametrize("name", ["qwen3_window", "lfm2_gqa", pytest.param("gpt_oss_gqa", marks=pytest.mark.sweep)])
def test_a_scan_writes_what_the_engine_writes(name: str) -> None:
    model = load_model(FOLDER / name, skip_tokenizer_init=True, progress=False)

    @partial(jax.jit, donate_argnums=1)
    def generate(params: dict, cache: Cache, ids: jax.Array, counts: jax.Array) -> tuple[jax.Array, Cache]:
        logits, cache = decode_step(model, params, cache, ids, counts)

        def one(carry: tuple[Cache, jax.Array], _: None) -> tuple[tuple[Cache, jax.Array], jax.Array]:
            cache, token = carry
            logits, cache = decode_step(model, params, cache, token)
            return (cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)), token

        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        (cache, _), tokens = jax.lax.scan(one, (cache, first), None, length=8)
        return tokens.T, cache

    tokens, cache = generate(model.params, make_cache(model, 2, 40), padded(), LENGTHS)
    llm = LLM.from_model(model, max_num_seqs=4, max_num_batched_tokens=16, num_pages=60, progress=False)
    expected = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert tokens.tolist() == [one.outputs[0].token_ids for one in expected]
    assert (cache.lengths == LENGTHS + 8).all()


@pytest.mark.parametrize("name", ["llama_gqa", "lfm2_gqa"])
def test_prompts_in_parts_have_the_bits_of_a_whole_pass(name: str) -> None:
    """Three steps of up to 9 tokens, in the second of which a sequence rests; the logits of each token."""
    model, ids = load(name), padded()
    whole = jax.jit(lambda params: forward(model, params, ids, page_size=32).logits)(model.params)
    step = jax.jit(partial(decode_step, model, all_tokens=True), donate_argnums=1)
    cache, done = make_cache(model, 2, 32, page_size=32), np.zeros(2, np.int32)
    for counts in ([9, 4], [7, 0], [5, 5]):
        part = np.zeros((2, 9), np.int32)
        for row, prompt, at, count in zip(part, PROMPTS, done, counts, strict=True):
            row[:count] = prompt[at : at + count]
        logits, cache = step(model.params, cache, part, np.array(counts, np.int32))
        for row, count in enumerate(counts):
            assert (logits[row, :count] == whole[row, done[row] : done[row] + count]).all()
        done += np.array(counts, np.int32)


def test_a_while_loop_ends_at_a_token() -> None:
    model = load("llama_gqa")

    @jax.jit
    def until(params: dict, cache: Cache, token: jax.Array, last: jax.Array) -> jax.Array:
        def one(carry: tuple) -> tuple:
            cache, token, count = carry
            logits, cache = decode_step(model, params, cache, token)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), count + 1

        goes_on = lambda carry: (carry[2] < 20) & (carry[1][0] != last)  # noqa: E731
        return jax.lax.while_loop(goes_on, one, (cache, token, jnp.int32(0)))[2]

    llm = LLM.from_model(model, max_num_seqs=2, max_num_batched_tokens=8, num_pages=20, progress=False)
    (found,) = llm.generate([[7]], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    ids = found.outputs[0].token_ids
    last = ids[5]
    count = until(model.params, make_cache(model, 1, 30), jnp.array([7]), jnp.int32(last))
    assert int(count) == ids.index(last) + 1


def test_under_vmap() -> None:
    """A batch of batches: each member has the bits that it has alone."""
    model = load("qwen3_window")
    ids = jnp.stack([jnp.arange(3, 11).reshape(2, 4), jnp.arange(40, 48).reshape(2, 4)]).astype(jnp.int32)

    def run(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, cache = decode_step(model, model.params, make_cache(model, 2, 16), ids)
        more, _ = decode_step(model, model.params, cache, ids[:, 0])
        keys = jax.random.split(jax.random.key(0), 2)
        return jnp.stack([logits, more]), draw(more, keys, temperature=0.9, top_k=20)

    def whole(ids: jax.Array) -> jax.Array:
        return forward(model, model.params, ids).logits

    for each in (run, whole):
        together = jax.jit(jax.vmap(each))(ids)
        alone = [jax.jit(each)(one) for one in ids]
        for leaf, *members in zip(*map(jax.tree.leaves, (together, *alone)), strict=True):
            assert (leaf == jnp.stack(members)).all()


def test_what_is_past_the_end_is_lost_and_harms_nobody() -> None:
    model = load("llama_gqa")
    step = jax.jit(partial(decode_step, model))

    def last(first: int) -> jax.Array:
        cache = make_cache(model, 2, 32, page_size=32)
        counts = np.array([first, 3], np.int32)
        _, cache = step(model.params, cache, np.full((2, 40), 5, np.int32), counts)
        return step(model.params, cache, np.array([6, 7], np.int32))[0][1]

    assert (last(40) == last(4)).all()


def test_arguments_that_do_not_fit() -> None:
    model: LoadedModel = load("llama_gqa")
    with pytest.raises(UserError, match="sequences=0"):
        make_cache(model, 0, 16)
    cache = make_cache(model, 2, 16)
    with pytest.raises(ValueError, match="3 rows, the cache has 2 sequences"):
        decode_step(model, model.params, cache, jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"token_ids is float32\[2\]"):
        decode_step(model, model.params, cache, jnp.ones(2))


def test_a_draw_depends_on_its_own_row() -> None:
    logits = jax.random.normal(jax.random.key(1), (4, 50)) * 3
    keys = jax.random.split(jax.random.key(0), 4)
    temperature, top_k = jnp.array([0.0, 0.7, 1.0, 2.0]), jnp.array([-1, 5, -1, 3])
    together = draw(logits, keys, temperature=temperature, top_k=top_k)
    assert together[0] == logits[0].argmax()
    for row in range(4):
        one = slice(row, row + 1)
        assert draw(logits[one], keys[one], temperature=temperature[one], top_k=top_k[one])[0] == together[row]


def test_draws_follow_the_distribution() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)
    drawn = draw(logits, jax.random.split(jax.random.key(0), 4000), top_p=0.9)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_sampling_logits_are_those_of_the_draw_and_have_a_gradient() -> None:
    logits = jax.random.normal(jax.random.key(1), (3, 50)) * 3
    how = dict(temperature=jnp.array([0.5, 1.0, 0.0]), top_k=jnp.array([4, -1, 2]), top_p=jnp.array([1.0, 0.7, 1.0]))
    left = sampling_logits(logits, **how)
    assert np.isfinite(left[0]).sum() == 4 and (left[2] == logits[2]).all()
    order = np.argsort(-logits[1])
    mass = np.cumsum(jax.nn.softmax(logits[1])[order])
    assert set(np.flatnonzero(np.isfinite(left[1]))) == set(order[: 1 + np.searchsorted(mass, 0.7)].tolist())
    keys = jax.random.split(jax.random.key(0), 3000)
    row = jnp.tile(logits[:1], (3000, 1))
    drawn = np.bincount(draw(row, keys, temperature=0.5, top_k=4), minlength=50) / 3000
    np.testing.assert_allclose(drawn, jax.nn.softmax(left[0]), atol=0.03)
    found = jax.grad(lambda x: jax.nn.log_softmax(sampling_logits(x, **how))[0, logits[0].argmax()])(logits)
    assert np.isfinite(found).all() and (found[0] != 0).sum() == 4
