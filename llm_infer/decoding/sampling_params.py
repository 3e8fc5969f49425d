"""What a user may ask of decoding, checked when it is made; names as in vLLM and the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from llm_infer.decoding.beam import MAX_BEAM_WIDTH
from llm_infer.errors import RequestError

MAX_LOGPROBS = 20
"""Most tokens per position whose log-probabilities a request can ask for (as in vLLM)."""

WITH_BEAMS = frozenset(
    {
        *("beam_width", "length_penalty", "early_stopping", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("seed", "temperature", "truncate_prompt_tokens"),
    }
)
"""What a beam search takes; everything else shapes a draw, which it does not make."""


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not (low < value if open_low else low <= value) or value > high:  # type: ignore[operator]
        left = "(" if open_low else "["
        raise RequestError(f"{name}={value!r}: expected a finite number in {left}{low:g}, {high:g}]")


def _integer(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}={value!r}: expected a whole number from {low} to {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next tokens are drawn and when to stop.

    Attributes:
        n: number of samples of the prompt.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens (-1 or 0: all).
        top_p: keep the smallest set of most likely tokens with this mass (Holtzman et al., 2020).
        seed: makes the draws repeatable, whatever else runs in the batch; None takes one from the engine's seed.
        max_tokens: most new tokens; None goes on to the end of the context.
        stop_token_ids: further tokens that end the output.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: return the log-probability of each new token and of the most likely ones, this many (0: the new
            token's alone), under the model's distribution before any sampling rule; None returns none.
        beam_width: search for the most likely outputs with this many beams (at most 16) instead of drawing; the request
            has as many outputs, best first, each with its `score`.
        length_penalty: beams are compared by their summed log-probability / (number of new tokens) ** length_penalty.
        early_stopping: when a beam search ends before all beams have: True as soon as there are `beam_width` results;
            False when the best beam, scored at its length of now, is no better than the worst result; "never" when no
            beam can become better.

    Raises:
        RequestError: a value is out of range; the message names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, 256)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Iterable):
            raise RequestError(f"stop_token_ids={self.stop_token_ids!r}: expected a list of token ids")
        if not isinstance(self.stop_token_ids, tuple):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        self._check_beams()

    def _check_beams(self) -> None:
        _number("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(f"early_stopping={self.early_stopping!r}: expected True, False or 'never'")
        set_apart = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.beam_width is not None:
            _integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
            if refused := [name for name in set_apart if name not in WITH_BEAMS]:
                raise RequestError(f"beam_width={self.beam_width} cannot be combined with {', '.join(refused)}")
            if self.temperature not in (0.0, 1.0):
                raise RequestError(
                    f"beam_width cannot be combined with temperature={self.temperature}: beams are not drawn"
                )
        elif refused := [name for name in set_apart if name in ("length_penalty", "early_stopping")]:
            raise RequestError(
                f"{', '.join(refused)} cannot be set without beam_width: only a beam search knows scores"
            )
