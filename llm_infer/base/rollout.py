"""Results of generation and scoring as arrays of one shape, as training programs take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_infer.base.errors import RequestError


@dataclass(frozen=True, slots=True)
class Rollout:
    """Samples as rows [N, T]: a prompt's tokens, then those drawn, then padding; rows of a prompt's samples are neighbours.

    What is said of a token stands in its own column, as `functional.token_logprobs` has it.

    Attributes:
        token_ids: Int32[N, T], 0 behind the end.
        mask: Bool[N, T], whether a token was drawn.
        logprobs: Float32[N, T] of drawn tokens, 0 elsewhere; whose they are says `logprobs_mode`.
        top_ids, top_logprobs: Int32 and Float32[N, T, K] of the most likely tokens in the place of each drawn one, -inf where
            there is none; K is the largest `logprobs` of the parameters.
        kept: Int32[N, T, W] of drawn tokens whose parameters have `kept_tokens`, a bit for each token that could have been
            drawn (`functional.unpacked_mask`); elsewhere all bits are set. None if none has.
        lengths: Int32[N] tokens before the padding.
        prompt_lengths: Int32[N].
        prompt_index: Int32[N], the prompt of each row.
        finish_reasons: of each row, as of `CompletionOutput`.
        texts: what was drawn, as text.
        weights_versions: names of the weights that computed each row.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    kept: np.ndarray | None
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    prompt_index: np.ndarray
    finish_reasons: list[str | None]
    texts: list[str]
    weights_versions: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the model thinks of tokens that are there, as rows [N, T].

    Attributes:
        token_ids: Int32[N, T], 0 behind the end.
        mask: Bool[N, T], whether a token is scored.
        logprobs: Float32[N, T] of scored tokens, 0 elsewhere.
        ranks: Int32[N, T], 1 for the most likely token, 0 where nothing is scored.
        top_ids, top_logprobs: Int32 and Float32[N, T, K] of the most likely tokens in each place, -inf where nothing is scored.
        lengths: Int32[N].
    """

    token_ids: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    lengths: np.ndarray


SHORTEST_ROW = 16


def row_length(longest: int, pad_to: int | None) -> int:
    """Returns the length of rows: `pad_to`, or else a power of two, so that few lengths are ever seen.

    Raises:
        RequestError: `pad_to` is no whole number, or too short.
    """
    if pad_to is None:
        return max(SHORTEST_ROW, 1 << (longest - 1).bit_length())
    if type(pad_to) is not int or pad_to < longest:
        raise RequestError(f"pad_to={pad_to!r:.60}: expected at least {longest}, the tokens that a row may get")
    return pad_to
