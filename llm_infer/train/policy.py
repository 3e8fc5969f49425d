"""Reinforcement learning in one process: rollouts by the engine, rewards by a function, steps by GRPO.

Group relative policy optimisation (Shao et al., DeepSeekMath, 2024): a sample's advantage is its reward less the mean of
those of its prompt, over their deviation. Engine and trainer share weights, and compute the same log-probabilities.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Progress
from llm_infer.base.rollout import Rollout
from llm_infer.decoding.features import StepFeatures, features_of
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.functional.whole import token_logprobs
from llm_infer.llm import LLM
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import Params
from llm_infer.train.state import Keeper, begin, make_step, require_counts, require_finite

SEED_STRIDE = 2**31
"""Between the seeds of two runs: more than rollouts that one makes."""

Prompt = str | Sequence[int]
Reward = Callable[[list[Any], list[str]], Sequence[float]]
"""Of the prompt and the text of each sample: a number for each, more is better."""


class Learnt(NamedTuple):
    """The model with what it has learnt, and the figures of each step.

    These are the mean `reward`, the `loss` and `gradient_norm` of the last update, the share of drawn tokens whose ratio was
    `clipped` in it, with `kl` the distance to the model as it was given, and the mean count of drawn `tokens`.
    """

    model: LoadedModel
    history: list[dict[str, float]]


def grpo(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    steps: int,
    samples: int = 8,
    prompts_per_step: int = 4,
    sampling: SamplingParams | None = None,
    optimizer: optax.GradientTransformation | None = None,
    updates: int = 1,
    clip: float = 0.2,
    kl: float = 0.0,
    trainable: Callable[[str], bool] | None = None,
    remat: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool = True,
    **engine: Any,
) -> Learnt:
    """Trains a model to write what a function rewards.

    Args:
        model: from `load_model(…, weights="dense")`; its own arrays stay as they are.
        prompts: from which each step takes `prompts_per_step` in turn.
        reward: rates samples.
        steps: rollouts to make and to learn from.
        samples: of each prompt in a step.
        sampling: how to draw: `max_tokens`, `temperature`, `stop_token_ids` and the like; by default 64 tokens at
            temperature 1. Limits such as top_p would draw from another distribution than the one that learns.
        optimizer: of optax; by default AdamW with a learning rate of 1e-6.
        updates: changes of the weights for each rollout.
        clip: how far the ratio of new to old probability counts (PPO, Schulman et al., 2017).
        kl: weight of the distance to the model as it was given; 0 for none.
        trainable, remat, checkpoint, checkpoint_every, progress: as of `finetune`.
        seed: of the draws.
        engine: further settings of the engine, as of `LLM`.

    Raises:
        UserError: settings do not fit, the function returns no number for each sample, or as `finetune`.
    """
    require_counts(steps=steps, samples=samples, prompts_per_step=prompts_per_step, updates=updates)
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError(f"seed={seed!r:.40}: expected a whole number from 0 to {2**31 - 1}")
    if clip <= 0 or kl < 0:
        raise UserError(f"clip={clip}, kl={kl}: expected a clip above 0 and a kl of at least 0")
    prompts = list(prompts)
    sampling = _checked(sampling or SamplingParams(temperature=1.0, max_tokens=64), prompts, samples)
    optimizer = optax.adamw(1e-6) if optimizer is None else optimizer
    state, fixed = begin(model, optimizer, trainable)
    heat = sampling.temperature

    def probabilities(params: Params, ids: Any) -> jax.Array:
        return token_logprobs(model, params, ids, temperature=heat, remat=remat)

    def of_batch(params: Params, batch: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(probabilities(params, batch["token_ids"]), batch, clip, kl)

    step, told = make_step(of_batch, optimizer), jax.jit(probabilities)
    llm = LLM.from_model(replace(model, params={**fixed, **state.params}), progress=False, **engine)
    longest = max(len(ids) for ids in _ids(llm, prompts)) + (sampling.max_tokens or llm.max_model_len)
    pad_to = min(-(-longest // 16) * 16, llm.max_model_len)
    history: list[dict[str, float]] = []
    bar = Progress(enabled=progress).task("GRPO", total=steps)
    run = {"prompts": list(prompts), "sampling": sampling, "samples": samples, "prompts_per_step": prompts_per_step}
    run |= {"updates": updates, "clip": clip, "kl": kl, "seed": seed}
    with contextlib.closing(Keeper(checkpoint, checkpoint_every, run, steps)) as keeper, bar as shown:
        state = keeper.newest(state, history)
        llm.update_weights(state.params, f"step-{len(history)}")
        for number in range(len(history), steps):
            shown.set(number)
            places = range(number * prompts_per_step, (number + 1) * prompts_per_step)
            asked = [prompts[place % len(prompts)] for place in places]
            drawn = [replace(sampling, n=samples, seed=seed * SEED_STRIDE + place) for place in places]
            found = llm.rollout(asked, drawn, pad_to=pad_to, progress=False)
            rewards = _rewards(reward, asked, found)
            batch = {"token_ids": found.token_ids, "mask": found.mask, "advantages": advantages(rewards, samples)}
            if updates > 1:
                batch["old"] = told({**fixed, **state.params}, found.token_ids)
            if kl:
                batch["first"] = told(model.params, found.token_ids)
            figures: dict[str, Any] = {}
            for _ in range(updates):
                state, figures = step(state, fixed, batch)
            llm.update_weights(state.params, f"step-{number + 1}")
            told_figures = {name: float(value) for name, value in figures.items()}
            lengths = {"tokens": float(found.mask.sum() / len(rewards))}
            history.append({"step": number + 1, "reward": float(rewards.mean()), **told_figures, **lengths})
            require_finite(history[-1], number + 1)
            keeper.keep(state, history)
        shown.set(steps)
    return Learnt(replace(model, params={**fixed, **state.params}), history)


def advantages(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Returns how much better each sample [N] is than the others of its prompt, in their standard deviations."""
    groups = rewards.reshape(-1, samples)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (groups.std(axis=1, keepdims=True) + 1e-6)).reshape(-1).astype(np.float32)


def loss(logprobs: jax.Array, batch: dict[str, Any], clip: float, kl: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the clipped loss over drawn tokens [N, T], each sample's tokens weighted alike, and figures.

    Args:
        logprobs: of the policy that learns.
        batch: `mask`, `advantages`; `old`, log-probabilities of the policy that drew (that which learns where they are not
            there); `first`, those of the model as it was given, for the distance to it.
        clip, kl: as of `grpo`.
    """
    mask = batch["mask"]
    old = batch.get("old", jax.lax.stop_gradient(logprobs))
    ratio = jnp.exp(jnp.where(mask, logprobs - old, 0.0))
    better = batch["advantages"][:, None]
    gain = jnp.minimum(ratio * better, jnp.clip(ratio, 1 - clip, 1 + clip) * better)
    tokens = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(jnp.where(mask, x, 0.0), axis=1) / tokens)

    figures = {"clipped": mean((jnp.abs(ratio - 1) > clip).astype(jnp.float32))}
    value = -mean(gain)
    if kl:
        apart = jnp.where(mask, batch["first"] - logprobs, 0.0)
        figures["kl"] = mean(jnp.exp(apart) - apart - 1)  # never negative (Schulman, 2020)
        value = value + kl * figures["kl"]
    return value, figures


def _checked(sampling: SamplingParams, prompts: Sequence[Prompt], samples: int) -> SamplingParams:
    neutral = SamplingParams()
    changed = [
        name for name in ("top_k", "top_p", "min_p", "typical_p") if getattr(sampling, name) != getattr(neutral, name)
    ]
    if sampling.num_sequences > sampling.n:
        changed.append("best_of")
    changed += (features_of(sampling) & (StepFeatures.PENALTIES | StepFeatures.MASKED)).words
    if changed or sampling.temperature <= 0:
        raise UserError(
            f"sampling: {', '.join(changed) or 'temperature=0'}: samples must come from the distribution that learns, so only a "
            "temperature above 0 may be set"
        )
    if not prompts or samples < 2:
        raise UserError(
            f"{len(prompts)} prompts, samples={samples}: expected a prompt, and at least 2 samples to compare"
        )
    return sampling


def _ids(llm: LLM, prompts: Sequence[Prompt]) -> list[Sequence[int]]:
    return [llm.tokenizer.encode(each) if isinstance(each, str) else each for each in prompts]


def _rewards(reward: Reward, asked: Sequence[Prompt], found: Rollout) -> np.ndarray:
    given = reward([asked[i] for i in found.prompt_index], found.texts)
    try:
        given = list(given)
        rewards = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        rewards = np.zeros(0, np.float32)
    if rewards.shape != (len(found.texts),) or not np.isfinite(rewards).all():
        raise UserError(
            f"reward returned {given!r:.80}: expected a finite number for each of {len(found.texts)} samples"
        )
    return rewards
