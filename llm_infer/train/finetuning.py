"""Supervised fine-tuning: makes a model more likely to continue prompts as examples do."""

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
from llm_infer.functional.whole import token_logprobs
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import Params
from llm_infer.train.state import Keeper, begin, make_step, require_counts, require_finite

Text = str | Sequence[int]
"""A text, or token ids."""

Example = Text | tuple[Text, Text]
"""What is to be learnt, or a prompt and the completion that is to be learnt."""

ROW_MULTIPLE = 16
"""Rows are as long as the longest example, rounded up to this."""


class Tuned(NamedTuple):
    """The model with what it has learnt, and the figures of each step."""

    model: LoadedModel
    history: list[dict[str, float]]


def finetune(
    model: LoadedModel,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int = 8,
    optimizer: optax.GradientTransformation | None = None,
    max_len: int | None = None,
    trainable: Callable[[str], bool] | None = None,
    remat: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> Tuned:
    """Trains a model on examples, which come in a random order again and again.

    Args:
        model: from `load_model(…, weights="dense")`; its own arrays stay as they are. With weights="stored" only what is not
            in blocks learns.
        examples: what to learn.
        steps: how many times to change the weights.
        batch_size: examples in each.
        optimizer: of optax; by default AdamW with a learning rate of 1e-5.
        max_len: tokens in a row; by default those of the longest example.
        trainable: says for a parameter's name whether it learns.
        remat: compute layers again for the gradient, which takes less memory and more time.
        seed: of the order.
        checkpoint: a directory where states are kept; the same call goes on from the newest there, also with more steps. What an
            optimizer of the same kind was made with is not compared.
        checkpoint_every: steps between two of them.
        progress: shows a bar on stderr.

    Raises:
        UserError: an example is empty or too long, there is nothing to train, the loss is not finite, or what is kept is of
            another run.
    """
    require_counts(steps=steps, batch_size=batch_size)
    rows, masks = _rows(model, list(examples), max_len)
    optimizer = optax.adamw(1e-5) if optimizer is None else optimizer
    state, fixed = begin(model, optimizer, trainable)
    step = make_step(lambda params, batch: loss(model, params, *batch, remat=remat), optimizer)
    history: list[dict[str, float]] = []
    run = {"examples": rows, "what is learnt of them": masks, "batch_size": batch_size, "seed": seed}
    bar = Progress(enabled=progress).task("Fine-tuning", total=steps)
    with contextlib.closing(Keeper(checkpoint, checkpoint_every, run, steps)) as keeper, bar as shown:
        state = keeper.newest(state, history)
        for number in range(len(history), steps):
            shown.set(number)
            chosen = _batch(number, len(rows), batch_size, seed)
            state, figures = step(state, fixed, (rows[chosen], masks[chosen]))
            history.append({"step": number + 1, **{name: float(value) for name, value in figures.items()}})
            require_finite(history[-1], number + 1)
            keeper.keep(state, history)
        shown.set(steps)
    return Tuned(replace(model, params={**fixed, **state.params}), history)


def loss(
    model: LoadedModel, params: Params, token_ids: Any, mask: Any, *, remat: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean negative log-probability of the tokens [B, T] under the mask."""
    found = token_logprobs(model, params, token_ids, remat=remat)
    tokens = jnp.sum(mask, dtype=jnp.float32)
    value = -jnp.sum(jnp.where(mask, found, 0.0)) / jnp.maximum(tokens, 1.0)
    return value, {"tokens": tokens}


def _rows(model: LoadedModel, examples: Sequence[Example], max_len: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples as rows of ids [N, T], and which of these are to be learnt."""
    if not examples:
        raise UserError("examples: there are none")
    parts: list[tuple[Text, Text]] = [_parts(each) for each in examples]
    ids = [(_ids(model, prompt, True), _ids(model, text, not len(prompt))) for prompt, text in parts]
    longest = max(len(prompt) + len(text) for prompt, text in ids)
    length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE if max_len is None else max_len
    if longest > length or longest > model.config.max_position_embeddings:
        most = min(length, model.config.max_position_embeddings)
        raise UserError(
            f"the longest example has {longest} tokens, expected at most {most}: shorten it or raise max_len"
        )
    rows, masks = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), bool)
    for row, mask, (prompt, text) in zip(rows, masks, ids, strict=True):
        if len(prompt) + len(text) < 2 or not text:
            raise UserError("an example has nothing to learn: expected a completion, or at least two tokens")
        row[: len(prompt) + len(text)] = [*prompt, *text]
        mask[max(1, len(prompt)) : len(prompt) + len(text)] = True
    return rows, masks


def _parts(example: Any) -> tuple[Text, Text]:
    """Returns prompt and completion; a pair may be a list, and holds texts or lists of ids, not ids."""
    if isinstance(example, str):
        return (), example
    try:
        found = list(example)
    except TypeError:
        found = []
    if found and all(isinstance(each, int | np.integer) for each in found):
        return (), [int(each) for each in found]
    if len(found) == 2 and not any(isinstance(each, int | float | np.number) for each in found):
        return found[0], found[1]
    raise UserError(f"example {example!r:.60}: expected a text, token ids, or a pair of prompt and completion")


def _ids(model: LoadedModel, text: Any, begins: bool) -> list[int]:
    """Returns token ids that the model has."""
    if isinstance(text, str):
        if model.tokenizer is None or not model.tokenizer.has_text:
            raise UserError("the model has no tokenizer: give examples as token ids")
        return model.tokenizer.encode(text, add_special_tokens=begins, begins=begins)
    ids = list(text)
    wrong = [i for i in ids if not isinstance(i, int | np.integer) or not 0 <= i < model.config.vocab_size]
    if wrong:
        raise UserError(f"token id {wrong[0]!r:.40}: expected whole numbers from 0 to {model.config.vocab_size - 1}")
    return [int(each) for each in ids]


def _batch(step: int, count: int, size: int, seed: int) -> np.ndarray:
    """Returns which examples a step takes: the same in every run, each once before one comes again."""
    places = np.arange(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in set((places // count).tolist())
    }
    return np.array([orders[int(place) // count][int(place) % count] for place in places])
