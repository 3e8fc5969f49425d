"""Compares generated tokens with the committed goldens, by the project's definition of "the same tokens"."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLOSE_CALL = 2e-3
"""Top-two margins (logits) below this may be decided by a last-bit difference."""


@dataclass(frozen=True)
class Goldens:
    """Greedy continuations by transformers: prompt ids, tokens [N, 64], top-two margins [N, 64], some last logits."""

    prompts: list[list[int]]
    tokens: np.ndarray
    margins: np.ndarray
    last_logits: np.ndarray
    stride: int


def load_goldens(name: str = "smollm2") -> Goldens:
    """The default model's goldens, or another's."""
    data = np.load(Path(__file__).parent / "goldens" / f"{name}_greedy.npz")
    return Goldens(
        json.loads(str(data["prompt_ids"])), data["tokens"], data["margins"], data["last_logits"], int(data["stride"])
    )


def assert_same_tokens(
    goldens: Goldens, which: Sequence[int], continue_: Callable[[list[list[int]], list[int]], list[list[int]]]
) -> int:
    """Every token equals the golden one, except at a close call: there the golden token is forced and the run goes on.

    Args:
        goldens: what to compare with.
        which: indices of the prompts.
        continue_: `(prompts, numbers of new tokens) -> new tokens of each`, greedy.

    Returns:
        How often a token had to be forced.
    """
    steps = goldens.tokens.shape[1]
    todo = dict.fromkeys(which, 0)
    forced = 0
    while todo:
        indices = list(todo)
        prompts = [goldens.prompts[i] + goldens.tokens[i, : todo[i]].tolist() for i in indices]
        outputs = continue_(prompts, [steps - todo[i] for i in indices])
        for i, output in zip(indices, outputs, strict=True):
            done = todo.pop(i)
            expected = goldens.tokens[i, done:].tolist()
            differing = [t for t, (a, b) in enumerate(zip(output, expected, strict=True)) if a != b]
            if differing:
                step = done + differing[0]
                margin = float(goldens.margins[i, step])
                assert margin < CLOSE_CALL, f"prompt {i}, step {step}: {output} != {expected} at a margin of {margin}"
                forced += 1
                if step + 1 < steps:
                    todo[i] = step + 1
    print(f"{len(which)} prompts × {steps} tokens equal, {forced} forced at close calls")
    return forced
