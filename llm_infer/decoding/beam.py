"""Beam search of one prompt as host arithmetic: which beams go on, which are finished, and when the search is over.

Same decisions as the beam search of Hugging Face `transformers` (without sampling), so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAX_BEAM_WIDTH = 16
"""Most beams of a request."""

NUM_CANDIDATES = 2 * MAX_BEAM_WIDTH
"""Most likely tokens that a step returns for each beam: `beam_width` and one for each id that ends a sequence."""

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A result: its score, its new token ids, and why it ended ("stop" or "length")."""

    score: float
    tokens: list[int]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Child:
    """A beam of the next step: the beam that it extends (its place), with which token, and the summed log-probability."""

    parent: int
    token: int
    score: float


class BeamSearch:
    """The state of a search. It starts with one beam, the prompt; after the first step there are `width`.

    Args:
        width: beams that are followed, and results.
        length_penalty: the score of a result is its summed log-probability / (number of new tokens) ** length_penalty.
        early_stopping: True ends when `width` results are there; False when the best beam, scored at its length of now,
            is not better than the worst result; "never" when it cannot become better (scored at the greatest length if
            the penalty is positive).
        stop_ids: ids that end a beam.
        min_tokens, max_tokens: new tokens of a result, at least and at most.

    Attributes:
        scores: summed log-probability of each beam, by place.
        results: best results so far, best first.
    """

    def __init__(
        self,
        width: int,
        *,
        length_penalty: float,
        early_stopping: EarlyStopping,
        stop_ids: frozenset[int],
        min_tokens: int,
        max_tokens: int,
    ) -> None:
        self.width, self.length_penalty, self.early_stopping = width, length_penalty, early_stopping
        self.scores = [0.0]
        self.results: list[Hypothesis] = []
        self._stop_ids = stop_ids
        self._min_tokens, self._max_tokens = min_tokens, max_tokens

    def advance(
        self, outputs: Sequence[Sequence[int]], candidates: Sequence[Sequence[tuple[int, float]]]
    ) -> list[Child] | None:
        """Takes one step.

        Args:
            outputs: new tokens of each beam, by place.
            candidates: of each beam its most likely next tokens with log-probabilities, best first: `width` and one for
                each stop id, or more. A tail left out cannot be among the best `width` that go on.

        Returns:
            The beams of the next step by place, or None if the search is over. A beam that is extended stays in its
            place with the best of its extensions, the others come to places whose beams die.
        """
        width, length = self.width, len(outputs[0]) + 1
        extended = sorted(
            (
                Child(place, token, score + logprob)
                for place, (score, found) in enumerate(zip(self.scores, candidates, strict=True))
                for token, logprob in found
                if length >= self._min_tokens or token not in self._stop_ids
            ),
            key=lambda child: -child.score,
        )
        last = length >= self._max_tokens
        running: list[Child] = []
        for rank, child in enumerate(extended):
            stopped = child.token in self._stop_ids
            if not (stopped or last):
                running.append(child)
            elif rank < width:  # lower ones end without having been among the best
                self._add_result(outputs[child.parent], child, length, "stop" if stopped else "length")
            if len(running) == width or (last and rank >= width):
                break
        if last or self._is_over(running[0].score, length):
            return None
        placed = self._place(running)
        self.scores = [child.score for child in placed]
        return placed

    def _add_result(self, output: Sequence[int], child: Child, length: int, reason: str) -> None:
        score = child.score / length**self.length_penalty
        self.results.append(Hypothesis(score, [*output, child.token], reason))
        self.results.sort(key=lambda result: -result.score)
        del self.results[self.width :]

    def _is_over(self, best: float, length: int) -> bool:
        if len(self.results) < self.width:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self._max_tokens
        return best / length**self.length_penalty <= self.results[-1].score

    def _place(self, running: list[Child]) -> list[Child]:
        places: list[Child | None] = [None] * self.width
        others = []
        for child in running:
            if places[child.parent] is None:
                places[child.parent] = child
            else:
                others.append(child)
        rest = iter(others)
        return [next(rest) if child is None else child for child in places]
