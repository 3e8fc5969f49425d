"""Parameters of decoding that a user may set, checked when they are made; names as in vLLM and the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from llm_infer.base.errors import RequestError
from llm_infer.base.plain_values import plain, plain_list
from llm_infer.decoding.beam import MAX_BEAM_WIDTH
from llm_infer.decoding.structured import StructuredOutputsParams

MAX_LOGPROBS = 20
"""Most tokens per position whose log-probabilities a request can ask for (as in vLLM), if it does not ask for all."""

ALL_LOGPROBS = -1
"""In place of a number of tokens: all of the vocabulary."""

MAX_N = 256
"""Most samples of one request."""
WITH_BEAMS = frozenset(
    {
        *("beam_width", "length_penalty", "early_stopping", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("seed", "temperature", "truncate_prompt_tokens", "skip_special_tokens"),
    }
)
"""Parameters that a beam search takes; all others shape a draw, and a beam search draws nothing."""


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not (low < value if open_low else low <= value) or value > high:  # type: ignore[operator]
        left = "(" if open_low else "["
        raise RequestError(f"{name}={value!r}: expected a finite number in {left}{low:g}, {high:g}]")


def _integer(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}={value!r}: expected a whole number from {low} to {high}")


def _switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name}={value!r}: expected True or False")


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    value = plain_list(value)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise RequestError(f"{name}={value!r:.60}: expected a list of token ids")
    ids = tuple(plain(token) for token in value)
    for token in ids:
        _integer(name, token, 0)
    return ids


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else plain_list(value)
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise RequestError(f"{name}={value!r:.60}: expected a text or a list of texts")
    texts = tuple(texts)
    if not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"{name}={value!r:.60}: expected texts that are not empty")
    for text in texts:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise RequestError(f"{name}={text!r:.60}: it holds half a surrogate pair, which no text of a model does")
    return texts


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters that say how the next tokens are drawn and when to stop.

    The rules of a draw apply in this order: penalties, `logit_bias`, the tokens that are allowed, temperature, `top_k`,
    `top_p`, `min_p`, `typical_p`, each over what the ones before it left.

    Attributes:
        n: number of samples of the prompt that are returned.
        best_of: number of samples that are drawn; the `n` with the highest `cumulative_logprob` are returned, best first.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens (-1 or 0: all).
        top_p: keep the smallest set of most likely tokens with this mass (Holtzman et al., 2020).
        min_p: keep tokens with at least this share of the probability of the most likely one.
        typical_p: keep the tokens whose information is closest to the entropy, with this mass (Meister et al., 2023).
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; 1 is neutral.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once for each time that a token is in the output.
        logit_bias: token id → number that is added to its logit.
        allowed_token_ids: only these tokens are drawn.
        bad_words: texts whose tokens, alone or after a space, are never all drawn in a row.
        seed: makes the draws repeatable, whatever else runs in the batch; None takes one from the engine's seed.
        max_tokens: most new tokens; None goes on to the end of the context.
        min_tokens: no end-of-sequence or stop token is drawn, and no stop string ends the output, before this many.
        stop: texts that end the output and are left out of it; special tokens count, although the text leaves them out.
        include_stop_str_in_output: leave the stop string, or the text of the stop token, at the end of the text.
        stop_token_ids: further tokens that end the output; the text leaves out the one that ends it.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: return the log-probability of each new token and of the most likely ones, this many (0: the new token's
            alone; -1: all of the vocabulary), under the model's distribution before any sampling rule; None returns none.
        kept_tokens: return which tokens each draw could have given: those that grammars, other rules on tokens and the limits
            (`top_k`, `top_p`, `min_p`, `typical_p`) leave. With temperature 0 nothing is drawn, and limits leave all.
        prompt_logprobs: the same as `logprobs` for each token of the prompt, but for -1; all of its pages are then computed anew.
        truncate_prompt_tokens: keep only this many tokens from the end of the prompt.
        structured_outputs: what the output must look like. `allowed_token_ids`, `bad_words` and `min_tokens` narrow it
            further; where they leave nothing that may follow, the output ends with the finish reason "error", as does
            one that must end before `min_tokens`. With `ignore_eos` it goes on as long as the structure can; where that is
            complete and nothing else may follow, the output ends, whatever `allowed_token_ids` holds.
        skip_special_tokens: leave markers such as `<|im_end|>` out of the text.
        beam_width: search for the most likely outputs with this many beams (at most 16) instead of drawing; the request
            has as many outputs, best first, each with its `score`.
        length_penalty: beams are compared by their summed log-probability / (number of new tokens) ** length_penalty.
        early_stopping: when a beam search ends before all beams have: True as soon as there are `beam_width` results;
            False when the best beam, scored at its present length, is no better than the worst result; "never" when no
            beam can become better.

    Raises:
        RequestError: a value is out of range or contradicts another; the message names it.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] | str = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    kept_tokens: bool = False
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        for name, nothing in (("stop", ()), ("stop_token_ids", ()), ("bad_words", ()), ("logit_bias", {})):
            if getattr(self, name) is None:  # other libraries and the OpenAI API have None by default
                object.__setattr__(self, name, nothing)
        _integer("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            _integer("best_of", self.best_of, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, ALL_LOGPROBS, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            if self.prompt_logprobs == ALL_LOGPROBS:
                raise RequestError(
                    f"prompt_logprobs=-1: expected 0 to {MAX_LOGPROBS}. All tokens at each position of a prompt would fill the "
                    "memory; for new tokens there is logprobs=-1"
                )
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None:
            _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        if self.beam_width is not None:
            _integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        for name in ("include_stop_str_in_output", "ignore_eos", "kept_tokens", "skip_special_tokens"):
            _switch(name, getattr(self, name))
        normal: dict[str, object] = {
            "stop": _texts("stop", self.stop),
            "bad_words": _texts("bad_words", self.bad_words),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "logit_bias": self._checked_bias(),
        }
        if self.allowed_token_ids is not None:
            normal["allowed_token_ids"] = _token_ids("allowed_token_ids", self.allowed_token_ids)
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        self._check_together()
        self._check_beams()

    def _checked_bias(self) -> dict[int, float]:
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias={self.logit_bias!r:.60}: expected a mapping from token ids to numbers")
        bias = {}
        for key, value in self.logit_bias.items():
            # JSON's keys are texts, so the OpenAI API writes ids as texts.
            short = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20
            token = int(key) if short else plain(key)
            value = plain(value)
            if not short and isinstance(token, str):
                raise RequestError(f"logit_bias has the token {token!r:.60}: expected a token id")
            _integer("logit_bias token", token, 0)
            _number(f"logit_bias[{token}]", value, -100.0, 100.0)
            bias[token] = float(value)
        return bias

    def _check_together(self) -> None:
        if self.best_of is not None:
            if self.best_of < self.n:
                raise RequestError(f"best_of={self.best_of} is below n={self.n}: draw at least as many as are returned")
            if self.best_of > self.n and self.temperature == 0.0:
                raise RequestError(f"best_of={self.best_of} with temperature=0: all samples would be the same")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if self.allowed_token_ids == ():
            raise RequestError("allowed_token_ids=(): expected at least one token, or None to allow all")
        if self.include_stop_str_in_output and not (self.stop or self.stop_token_ids):
            raise RequestError(
                "include_stop_str_in_output=True without stop or stop_token_ids: give the stop strings in stop"
            )
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            found = f"{self.structured_outputs!r:.60}"
            raise RequestError(f"structured_outputs={found}: expected StructuredOutputsParams(...)")

    def _check_beams(self) -> None:
        _number("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and str(self.early_stopping) != "never":
            raise RequestError(f"early_stopping={self.early_stopping!r}: expected True, False or 'never'")
        set_apart = [
            f.name for f in fields(self) if getattr(self, f.name) != (f.default if f.default is not MISSING else {})
        ]
        if self.beam_width is not None:
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

    @property
    def num_sequences(self) -> int:
        """Samples that are drawn, or beams that are followed."""
        return self.beam_width or self.best_of or self.n

    def stop_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Returns the ids that end an output, of a model with these end-of-sequence tokens.

        Once a structure is complete its end is all that can follow, so `ignore_eos` leaves nothing to go on to; see TokenRules.
        """
        ignored = self.ignore_eos and self.structured_outputs is None
        return frozenset(self.stop_token_ids) | (frozenset() if ignored else eos_token_ids)

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty is not neutral."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Checks that the model has all token ids; raises a RequestError that names the parameter."""
        given = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": tuple(self.logit_bias),
        }
        for name, ids in given.items():
            for token in ids:
                if token >= vocab_size:
                    raise RequestError(f"{name} has token {token}, the vocabulary ends at {vocab_size - 1}")
