"""forward and token_logprobs: the dense model's numbers, the engine's bits, and rows that hold several sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.functional import forward, token_logprobs
from llm_infer.loading import load_model
from tests.models.family_checkpoints import FOLDER, NAMES, golden, load

SOME = ("gemma3_gqa", "glm4_moe_gqa", "lfm2_gqa", "opt_pre")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME else pytest.mark.sweep) for n in NAMES])
def test_logits_and_hidden_states_are_those_of_transformers(name: str) -> None:
    model, expected = load(name), golden(name)
    ids = np.zeros((2, 3 + max(map(len, expected.prompts))), np.int32)  # the ends of rows are padding
    for row, prompt in zip(ids, expected.prompts, strict=True):
        row[: len(prompt)] = prompt
    run = jax.jit(lambda params, ids: forward(model, params, ids, hidden_states=(-1, 1, 1), remat=True))
    found = run(model.params, ids)
    for row, logits in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_allclose(row[: len(logits)], logits, atol=1e-4)
    first, length = found.hidden_states[1][0], len(expected.prompts[0])
    np.testing.assert_allclose(first[:length], expected.hidden[0], atol=1e-4)
    assert (found.hidden_states[1] == found.hidden_states[2]).all()
    logprobs = jax.jit(partial(token_logprobs, model))(model.params, ids)
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(found.logits))[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(logprobs[:, 1:], picked, atol=1e-5)
    assert (logprobs[:, 0] == 0).all()


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss_gqa",
        "lfm2_mha",
        pytest.param("qwen3_window", marks=pytest.mark.sweep),
        pytest.param("opt_pre", marks=pytest.mark.sweep),
    ],
)
def test_segments_are_sequences_of_their_own(name: str) -> None:
    model, (first, second) = load(name), golden(name).prompts
    packed = np.array([[*first, *second, 0]], np.int32)
    segments = np.array([[7] * len(first) + [2] * len(second) + [0]], np.int32)
    found = jax.jit(lambda params: forward(model, params, packed, segments=segments).logits)(model.params)[0]
    alone = jax.jit(lambda params, ids: forward(model, params, ids).logits)
    np.testing.assert_allclose(found[: len(first)], alone(model.params, np.array([first]))[0], atol=1e-4)
    np.testing.assert_allclose(found[len(first) : -1], alone(model.params, np.array([second]))[0], atol=1e-4)
    segments[0, len(first) + 2 :] = 7  # a number that comes again is another sequence
    again = token_logprobs(model, model.params, packed, segments=segments)[0]
    rest = token_logprobs(model, model.params, np.array([[*second[2:], 0]]))[0]
    np.testing.assert_allclose(again[len(first) + 2 :], rest, atol=1e-4)
    segments[0, len(first) :] = 2
    logprobs = token_logprobs(model, model.params, packed, segments=segments)[0]
    assert logprobs[0] == 0 and logprobs[len(first)] == 0
    expected = token_logprobs(model, model.params, np.array([second]))[0]
    np.testing.assert_allclose(logprobs[len(first) : -1], expected, atol=1e-4)


def test_temperature_divides_logits() -> None:
    model, ids = load("llama_gqa"), np.array([golden("llama_gqa").prompts[0]])
    logits = forward(model, model.params, ids).logits
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits / 0.7)[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(token_logprobs(model, model.params, ids, temperature=0.7)[:, 1:], expected, atol=1e-5)


def value_of(run: Callable) -> Callable:
    """The value that a gradient is of, out of the program that also computes the gradient."""
    return lambda *given: jax.value_and_grad(lambda *args: ((found := run(*args)).sum(), found), has_aux=True)(*given)[
        0
    ][1]


BITS = [("llama_gqa", "dense"), ("gemma3_gqa", "stored")]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        pytest.param(name, weights, marks=() if (name, weights) in BITS else pytest.mark.sweep)
        for name in ("llama_gqa", "gemma3_gqa", "gpt_oss_gqa", "qwen3_window")
        for weights in ("stored", "dense")
    ],
)
def test_scoring_has_the_bits_of_decoding(name: str, weights: str) -> None:
    """`rollout`, `score_tokens`, and `token_logprobs`, also as the forward pass of a gradient."""
    model = load_model(FOLDER / name, weights=weights, skip_tokenizer_init=True, progress=False)
    llm = LLM.from_model(model, max_num_seqs=4, max_num_batched_tokens=16, num_pages=60, progress=False)
    prompts = [list(range(3, 3 + n)) for n in (5, 17, 9)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True, logprobs=2)
    found = llm.rollout(prompts, params, pad_to=32)
    plain = partial(token_logprobs, model)
    for run in [plain, value_of(partial(plain, remat=True))] if weights == "dense" else [plain]:
        scored = np.asarray(jax.jit(run)(model.params, found.token_ids))
        assert (scored == found.logprobs)[found.mask].all()
    rows = [row[:length].tolist() for row, length in zip(found.token_ids, found.lengths, strict=True)]
    scores = llm.score_tokens(rows, start=found.prompt_lengths, top_logprobs=2, pad_to=32)
    for array in ("token_ids", "mask", "logprobs", "lengths", "top_ids", "top_logprobs"):
        assert (getattr(scores, array) == getattr(found, array)).all(), array


def test_arguments_that_do_not_fit() -> None:
    model = load("llama_gqa")
    with pytest.raises(ValueError, match=r"token_ids is int32\[3\], expected whole numbers \[B, T\]"):
        forward(model, model.params, jnp.arange(3))
    with pytest.raises(ValueError, match=r"segments is \[1, 2\]"):
        token_logprobs(model, model.params, jnp.ones((1, 3), jnp.int32), segments=jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="layer 9, expected 0"):
        forward(model, model.params, jnp.ones((1, 3), jnp.int32), hidden_states=(9,))
    assert forward(model, model.params, [[5, 6, 7]]).logits.shape[:2] == (1, 3)
    for message, params in {
        "params: final_norm.weight missing": {n: v for n, v in model.params.items() if n != "final_norm.weight"},
        "params: the model has no other": {**model.params, "other": jnp.zeros(3)},
        r"params: layers.attn.o.weight has the shape \[1, 32, 32\], expected": {
            **model.params,
            "layers.attn.o.weight": model.params["layers.attn.o.weight"][:1],
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            token_logprobs(model, params, [[5, 6, 7]])
