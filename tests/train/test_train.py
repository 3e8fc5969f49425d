"""Training: what is learnt, runs that go on where they stopped, the loss by its formula, and what cannot be trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_infer import LLM, SamplingParams, load_model
from llm_infer.base.errors import UserError
from llm_infer.functional import LoadedModel
from llm_infer.text.byte_tokenizer import byte_tokenizer
from llm_infer.train import finetune, grpo, policy
from tests.models.family_checkpoints import FOLDER

EXAMPLES = [([5, 6, 7], [9, 10, 11, 12]), ([8, 9], [3, 4, 5, 6, 7]), [20, 21, 22, 23]]
ENGINE = {"num_pages": 80, "max_num_seqs": 16, "max_num_batched_tokens": 32}


def tiny(weights: str = "dense") -> LoadedModel:
    model = load_model(FOLDER / "llama_mha", weights=weights, skip_tokenizer_init=True, progress=False)
    return replace(model, tokenizer=byte_tokenizer(model.config.vocab_size))


def test_fine_tuning_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = tiny()
    before = {name: np.asarray(value) for name, value in model.params.items()}
    how = dict(batch_size=3, optimizer=optax.adam(1e-2), progress=False)
    whole = finetune(model, EXAMPLES, steps=25, **how)
    losses = [step["loss"] for step in whole.history]
    assert losses[-1] < 0.05 < 1 < losses[0]
    llm = LLM.from_model(whole.model, progress=False, **ENGINE)
    (found,) = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=4))
    assert found.outputs[0].token_ids == [9, 10, 11, 12]
    assert all((np.asarray(model.params[name]) == value).all() for name, value in before.items())

    finetune(model, EXAMPLES, steps=7, checkpoint=tmp_path, checkpoint_every=5, **how)
    rest = finetune(model, EXAMPLES, steps=25, checkpoint=tmp_path, checkpoint_every=5, **how)
    assert rest.history == whole.history
    assert all((rest.model.params[name] == value).all() for name, value in whole.model.params.items())
    for message, changed in {
        "step 25 is not of this run: it has other parameters, or another optimizer": {"optimizer": optax.sgd(0.1)},
        "step 25 is of a run with other seed: take another directory": {"seed": 1},
        "step 25 is of a run with other batch_size": {"batch_size": 2},
        "step 25 is past steps=20: raise it": {"steps": 20},
    }.items():
        with pytest.raises(UserError, match=message):
            finetune(model, EXAMPLES, **{**how, "steps": 30, "checkpoint": tmp_path, **changed})
    with pytest.raises(UserError, match="with other examples"):
        finetune(model, EXAMPLES[::-1], steps=30, checkpoint=tmp_path, **how)


def test_grpo_raises_the_reward() -> None:
    def share_of_early_letters(prompts: list, texts: list[str]) -> list[float]:
        return [sum(letter in "abcdefgh" for letter in text) / max(1, len(text)) for text in texts]

    sampling = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    how = dict(samples=16, prompts_per_step=2, sampling=sampling, optimizer=optax.adam(1e-2), progress=False, **ENGINE)
    found = grpo(tiny(), [[5, 6, 7], "ab"], share_of_early_letters, steps=10, updates=2, kl=0.01, **how)
    rewards = [step["reward"] for step in found.history]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3]) + 0.1
    assert found.history[-1]["kl"] > 0 and found.history[-1]["tokens"] == 8


def test_the_loss_is_that_of_the_formula() -> None:
    logprobs, mask = jnp.array([[0.0, -1.0, -2.0], [0.0, -0.5, 0.0]]), jnp.array([[0, 1, 1], [0, 1, 0]], bool)
    batch = {"mask": mask, "advantages": jnp.array([1.0, -2.0]), "old": logprobs.at[0, 1].add(-1.0).at[1, 1].add(0.5)}
    value, figures = policy.loss(logprobs, batch, 0.2, 0.0)
    # First row: ratio e, clipped to 1.2, and 1. Second: e^-0.5, and the clipped 0.8 is the smaller gain.
    np.testing.assert_allclose(value, -np.mean([(1.2 + 1) / 2, min(np.exp(-0.5) * -2, 0.8 * -2)]), rtol=1e-6)
    np.testing.assert_allclose(figures["clipped"], np.mean([0.5, 1.0]), rtol=1e-6)
    first = {**batch, "first": logprobs - jnp.log(2.0)}
    value, figures = policy.loss(logprobs, first, 0.2, 0.1)
    np.testing.assert_allclose(figures["kl"], 0.5 - np.log(0.5) - 1, rtol=1e-5)
    better = policy.advantages(np.array([1, 2, 3, 5, 5, 5], np.float32), 3)
    np.testing.assert_allclose(better, [-1.2247, 0, 1.2247, 0, 0, 0], atol=1e-3)


def test_what_cannot_be_trained() -> None:
    model, rate = tiny(), dict(steps=1, progress=False)
    with pytest.raises(UserError, match="nothing to train"):
        finetune(model, EXAMPLES, trainable=lambda name: False, **rate)
    with pytest.raises(UserError, match="the longest example has 7 tokens, expected at most 4"):
        finetune(model, EXAMPLES, max_len=4, **rate)
    with pytest.raises(UserError, match="step 2: loss=nan: lower the learning rate"):
        finetune(model, EXAMPLES, steps=4, optimizer=optax.sgd(1e30), progress=False)
    with pytest.raises(UserError, match="nothing to learn"):
        finetune(model, [([5], [])], **rate)
    for message, example in {
        "token id 133: expected whole numbers from 0 to 127": [5, 133],
        "token id -3": ([5], [-3]),
        r"example \[5.5, 6.5\]: expected a text": [5.5, 6.5],
        "example 7: expected a text": 7,
    }.items():
        with pytest.raises(UserError, match=message):
            finetune(model, [example], **rate)
    with pytest.raises(UserError, match="batch_size=0: expected a whole number from 1"):
        finetune(model, EXAMPLES, batch_size=0, **rate)
    with pytest.raises(UserError, match="sampling: best_of"):
        grpo(model, [[5]], lambda p, t: [0.0], sampling=SamplingParams(temperature=1.0, best_of=8), **rate)
    with pytest.raises(UserError, match="sampling: top_p"):
        grpo(model, [[5]], lambda p, t: [0.0], sampling=SamplingParams(temperature=1.0, top_p=0.9), **rate)
    with pytest.raises(UserError, match="temperature=0"):
        grpo(model, [[5]], lambda p, t: [0.0], sampling=SamplingParams(temperature=0.0), **rate)
    with pytest.raises(UserError, match="a finite number for each of 2 samples"):
        short = SamplingParams(temperature=1.0, max_tokens=2)
        grpo(model, [[5]], lambda p, t: [0.0], samples=2, prompts_per_step=1, sampling=short, **rate, **ENGINE)


def test_what_is_not_in_blocks_learns_beside_what_is() -> None:
    model = tiny("stored")
    found = finetune(model, EXAMPLES, steps=3, batch_size=2, optimizer=optax.adam(1e-2), progress=False)
    changed = {name for name, value in found.model.params.items() if value is not model.params[name]}
    assert {"final_norm.weight", "layers.attn_norm.weight"} <= changed and found.history[2]["loss"] > 0
