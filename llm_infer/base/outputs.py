"""Results of generation, scoring and embedding; names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token at a position, its rank (1 = most likely), and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
        index: sample index, 0 … n-1.
        text: new text, special tokens left out.
        token_ids: new token ids, an ending end-of-sequence id included.
        finish_reason: "stop" (end-of-sequence, stop token or stop string), "length" (max_tokens or end of the context),
            "abort", "error" (no token could follow, or a step failed: see `error`); None while it runs.
        error: what went wrong and which setting to change, where the finish reason is "error".
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended it; None for anything else.
        logprobs: for each new token, its own log-probability and those of the most likely ones, by id; None if not asked for.
        kept_tokens: for each new token Int32[W], the tokens that its draw could have given: bit `token % 32` of word
            `token // 32`; None if not asked for.
        cumulative_logprob: sum over the new tokens; None if neither `logprobs` nor `best_of` asked for it.
        score: of a beam: summed log-probability / (number of new tokens) ** length_penalty.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    kept_tokens: list[np.ndarray] | None = None
    score: float | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds.

    Attributes:
        queue: from arrival to the first scheduled token.
        time_to_first_token: from arrival to the first new token on the host.
        total: from arrival to the end of the last sample.
        num_preemptions: how often one of its samples lost its pages and computed its tokens again.
        num_drafted_tokens, num_accepted_tokens: tokens proposed by speculative decoding, and those that were right.
    """

    queue: float
    time_to_first_token: float
    total: float
    num_preemptions: int
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """Result of one prompt.

    Attributes:
        request_id: the engine's name for the request.
        prompt: the prompt's text; None when token ids were given.
        prompt_token_ids: the prompt's token ids.
        outputs: the samples, by index.
        num_cached_tokens: prompt tokens that the prefix cache had.
        metrics: times; None until the request has finished.
        prompt_logprobs: for each prompt token as in `CompletionOutput.logprobs`, None for the first; None if not asked for.
        weights_versions: names of the weights that it ran with (see `LLM.update_weights`), more than one if they changed
            meanwhile.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    weights_versions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """The likelihood of a continuation.

    Attributes:
        logprob: log-likelihood of the continuation given its context: the sum over its tokens.
        token_ids, token_logprobs: its tokens and their log-probabilities.
        is_greedy: whether each token is the most likely one, so greedy decoding would write it.
        text: text of the tokens. It begins before the continuation where the context ended in white space or inside a token.
    """

    logprob: float
    token_ids: list[int]
    token_logprobs: list[float]
    is_greedy: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A vector [E] for a text, and the text's token ids."""

    embedding: list[float]
    prompt_token_ids: list[int]


@dataclass(slots=True)
class StreamChunk:
    """New text of one sample while it is generated: only whole characters and what cannot become a stop string.

    The last chunk of a sample has a `finish_reason`, with `stop_reason` or `error` as in `CompletionOutput`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    error: str | None = None
