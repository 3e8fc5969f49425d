"""Conversations to send: random ones, ones with shared prefixes, and files of ShareGPT and Spec-Bench."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_infer.base.errors import UserError
from llm_infer.base.files import parsed_json, read_text
from llm_infer.bench.serving.requests import Conversation, Turn
from llm_infer.bench.serving.vocabulary import Vocabulary


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of random requests.

    Attributes:
        input, output: of prompt and answer.
        range_ratio: lengths are drawn evenly from [length × (1 − ratio), length × (1 + ratio)].
        prefix: tokens before the prompt that all requests share.
        turns: questions of a conversation.
    """

    input: int = 1024
    output: int = 128
    range_ratio: float = 0.0
    prefix: int = 0
    turns: int = 1


def random_requests(vocabulary: Vocabulary, count: int, lengths: Lengths, seed: int) -> list[Conversation]:
    """Returns requests with random prompts of given lengths; later turns of a conversation have no prefix."""
    rng = np.random.default_rng(seed)
    prefix = vocabulary.draw(rng, lengths.prefix)

    def drawn(length: int) -> int:
        low, high = int(length * (1 - lengths.range_ratio)), int(length * (1 + lengths.range_ratio))
        return max(1, int(rng.integers(low, high + 1)))

    def turn(index: int) -> Turn:
        prompt = vocabulary.draw(rng, drawn(lengths.input))
        if index == 0:
            prompt = np.concatenate([prefix, prompt])
        return Turn(prompt, drawn(lengths.output), len(prompt))

    return [Conversation([turn(index) for index in range(lengths.turns)]) for _ in range(count)]


def prefix_repetition(
    vocabulary: Vocabulary, count: int, prefixes: int, prefix: int, suffix: int, output: int, seed: int
) -> list[Conversation]:
    """Returns requests of which each begins with one of a few prefixes, in random order."""
    rng = np.random.default_rng(seed)
    shared = [vocabulary.draw(rng, prefix) for _ in range(prefixes)]
    which = rng.permutation(np.arange(count) % prefixes)
    prompts = [np.concatenate([shared[index], vocabulary.draw(rng, suffix)]) for index in which]
    return [Conversation([Turn(prompt, output, len(prompt))]) for prompt in prompts]


def spec_bench(path: str, count: int, output: int, turns: int, seed: int) -> list[Conversation]:
    """Returns conversations of a file in Spec-Bench's format: JSON lines with `turns`, a list of questions."""
    found = []
    for number, entry in _lines(path):
        questions = entry.get("turns") if isinstance(entry, dict) else None
        if not isinstance(questions, list) or not questions or not all(isinstance(each, str) for each in questions):
            raise UserError(f'--dataset-path {path}: line {number} has no texts in "turns"')
        found.append(Conversation([Turn(each, output) for each in questions[:turns]]))
    return _some(found, count, path, seed)


def sharegpt(path: str, count: int, output: int | None, turns: int, seed: int) -> list[Conversation]:
    """Returns conversations of a file in ShareGPT's format: a JSON list of objects with `conversations`.

    Without `output` an answer may be as long as the file's, at about four characters a token.
    """
    entries = parsed_json(read_text(path, f"--dataset-path {path}"), f"--dataset-path {path}")
    if not isinstance(entries, list):
        raise UserError(f"--dataset-path {path}: expected a JSON list of conversations")
    found = []
    for entry in entries:
        said = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
        pairs = list(_questions(said if isinstance(said, list) else []))[:turns]
        if pairs:
            found.append(Conversation([Turn(asked, output or max(4, len(answer) // 4)) for asked, answer in pairs]))
    return _some(found, count, path, seed)


def _questions(said: list[Any]) -> Iterator[tuple[str, str]]:
    """Finds the questions and answers that follow each other from the start."""
    for asked, answer in zip(said[::2], said[1::2], strict=False):
        if not isinstance(asked, dict) or not isinstance(answer, dict) or asked.get("from") not in ("human", "user"):
            return
        question, reply = asked.get("value"), answer.get("value")
        if not (isinstance(question, str) and question and isinstance(reply, str)):
            return
        yield question, reply


def _lines(path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(path, f"--dataset-path {path}").splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"--dataset-path {path}: line {number} is not JSON") from None


def _some(found: list[Conversation], count: int, path: str, seed: int) -> list[Conversation]:
    """Returns so many in random order, again from the start where the file has fewer."""
    if not found:
        raise UserError(f"--dataset-path {path}: no conversation in it")
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[order[index % len(found)]] for index in range(count)]
