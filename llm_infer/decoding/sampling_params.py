"""What a user may ask of decoding, checked when it is made; names as in vLLM and the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from llm_infer.errors import RequestError

MAX_LOGPROBS = 20
"""Most tokens per position whose log-probabilities a request can ask for (as in vLLM)."""


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
