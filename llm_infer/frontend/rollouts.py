"""Finished requests as arrays for training: what was drawn, what was scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llm_infer.base.errors import RequestError
from llm_infer.base.outputs import Logprob, RequestOutput
from llm_infer.base.plain_values import plain_list
from llm_infer.base.rollout import Rollout, TokenScores, row_length
from llm_infer.decoding.sampling_params import ALL_LOGPROBS, SamplingParams
from llm_infer.frontend.prompts import Asked


def for_rollout(params: SamplingParams) -> SamplingParams:
    """Returns parameters that also ask for log-probabilities of the drawn tokens.

    Raises:
        RequestError: nothing is drawn, or all log-probabilities of each token are wanted.
    """
    if params.beam_width is not None:
        raise RequestError("rollout: beam_width: a beam search draws nothing, so its tokens have no log-probabilities")
    if params.logprobs == ALL_LOGPROBS:
        raise RequestError("rollout: logprobs=-1: expected at most 20 of the most likely tokens")
    return params if params.logprobs is not None else replace(params, logprobs=0)


def check_length(asked: Sequence[Asked], max_model_len: int, pad_to: int | None) -> None:
    """Refuses rows that are too short for what requests may draw, before anything is drawn.

    Raises:
        RequestError: as `row_length`.
    """

    def most(one: Asked) -> int:
        new = one.params.max_tokens
        return max_model_len if new is None else min(max_model_len, len(one.ids) + new)

    row_length(max((most(one) for one in asked), default=1), pad_to)


def rollout_of(results: Sequence[RequestOutput], asked: Sequence[Asked], pad_to: int | None) -> Rollout:
    """Puts the results of requests with parameters `for_rollout` into rows; `pad_to` as of `row_length`.

    Raises:
        RequestError: a request failed.
    """
    tops = max((one.params.logprobs or 0 for one in asked), default=0)
    rows = [(index, result, sample) for index, result in enumerate(results) for sample in result.outputs]
    if error := next((sample.error for _, _, sample in rows if sample.error is not None), None):
        raise RequestError(error)
    longest = max((len(result.prompt_token_ids) + len(sample.token_ids) for _, result, sample in rows), default=1)
    found = _Rows(len(rows), row_length(longest, pad_to), tops)
    kept: np.ndarray | None = None
    for row, (index, result, sample) in enumerate(rows):
        ids, start = [*result.prompt_token_ids, *sample.token_ids], len(result.prompt_token_ids)
        found.put(row, ids, start, sample.logprobs or [], asked[index].params.logprobs or 0)
        if sample.kept_tokens:
            if kept is None:
                kept = np.full((*found.token_ids.shape, len(sample.kept_tokens[0])), -1, np.int32)
            kept[row, start : len(ids)] = sample.kept_tokens
    return Rollout(
        token_ids=found.token_ids,
        mask=found.mask,
        logprobs=found.logprobs,
        top_ids=found.top_ids,
        top_logprobs=found.top_logprobs,
        kept=kept,
        lengths=found.lengths,
        prompt_lengths=np.array([len(result.prompt_token_ids) for _, result, _ in rows], np.int32),
        prompt_index=np.array([index for index, _, _ in rows], np.int32),
        finish_reasons=[sample.finish_reason for _, _, sample in rows],
        texts=[sample.text for _, _, sample in rows],
        weights_versions=[result.weights_versions for _, result, _ in rows],
    )


def starts_of(start: int | Sequence[int], ids: Sequence[Sequence[int]]) -> list[int]:
    """Returns where scoring starts in each row; a first token has nothing before it, so it has no score.

    Raises:
        RequestError: something else than whole numbers within the rows.
    """
    values = plain_list(start)
    values = values if isinstance(values, list | tuple) else [values] * len(ids)
    if len(values) != len(ids) or not all(
        type(each) is int and 0 <= each <= len(row) for each, row in zip(values, ids, strict=False)
    ):
        raise RequestError(f"start={start!r:.60}: expected a place in the row, one for all {len(ids)} or one for each")
    return [max(1, each) for each in values]


def scores_of(results: Sequence[RequestOutput], starts: Sequence[int], tops: int, pad_to: int | None) -> TokenScores:
    """Puts log-probabilities of prompts, with the `tops` most likely tokens, into rows; `pad_to` as of `row_length`.

    Raises:
        RequestError: a request failed.
    """
    if error := next((result.outputs[0].error for result in results if result.outputs[0].error is not None), None):
        raise RequestError(error)
    longest = max((len(result.prompt_token_ids) for result in results), default=1)
    found = _Rows(len(results), row_length(longest, pad_to), tops)
    for row, (result, start) in enumerate(zip(results, starts, strict=True)):
        logprobs = [at or {} for at in (result.prompt_logprobs or [])[start:]]
        found.put(row, result.prompt_token_ids, start, logprobs, tops)
    return TokenScores(
        found.token_ids, found.mask, found.logprobs, found.ranks, found.top_ids, found.top_logprobs, found.lengths
    )


class _Rows:
    """The arrays that both kinds of results have."""

    def __init__(self, rows: int, length: int, tops: int) -> None:
        self.token_ids, self.ranks = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
        self.mask, self.logprobs = np.zeros((rows, length), bool), np.zeros((rows, length), np.float32)
        self.top_ids = np.zeros((rows, length, tops), np.int32)
        self.top_logprobs = np.full((rows, length, tops), -np.inf, np.float32)
        self.lengths = np.zeros(rows, np.int32)

    def put(self, row: int, ids: Sequence[int], start: int, logprobs: Sequence[dict[int, Logprob]], tops: int) -> None:
        """Fills a row with tokens, and from `start` on with what is known of each and of the `tops` most likely ones."""
        self.token_ids[row, : len(ids)] = ids
        self.lengths[row] = len(ids)
        self.mask[row, start : len(ids)] = True
        for place, at in enumerate(logprobs, start):
            own = at[ids[place]]
            self.logprobs[row, place], self.ranks[row, place] = own.logprob, own.rank
            if tops:
                best = sorted(at.items(), key=lambda pair: pair[1].rank)
                best = [pair for pair in best if pair[1].rank <= tops][:tops]  # not the token itself behind them
                self.top_ids[row, place, : len(best)] = [token for token, _ in best]
                self.top_logprobs[row, place, : len(best)] = [one.logprob for _, one in best]
