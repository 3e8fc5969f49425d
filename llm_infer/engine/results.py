"""What a step returns beside ids, brought into the form that events carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from llm_infer.decoding.features import StepFeatures
from llm_infer.decoding.sampling_params import ALL_LOGPROBS
from llm_infer.engine.step.features import TOLD_OF_DRAWS
from llm_infer.scheduler.plan import StepPlan
from llm_infer.scheduler.request import Request, Sequence, TokenEvent, TokenLogprobs


def attach_draws(events: Iterable[TokenEvent], plan: StepPlan, outputs: Mapping[str, np.ndarray]) -> None:
    """Gives the events of requests that asked for more than tokens what the step's `outputs` say of each draw."""
    if "logprobs" not in outputs and "kept" not in outputs:
        return
    places = {row.sequence: (shard, i) for shard, rows in enumerate(plan.rows) for i, row in enumerate(rows)}
    steps = Counter[Sequence]()
    for event in events:
        request = event.sequence.request
        if not request.features & TOLD_OF_DRAWS:
            continue  # results of a beam search may belong to sequences without a row in the step
        shard, row = places[event.sequence]
        place = (shard, row) if plan.num_steps == 1 else (shard, steps[event.sequence], row)
        steps[event.sequence] += 1
        if StepFeatures.LOGPROBS in request.features:
            event.logprobs = logprobs_at(outputs, place, request.sampling.logprobs or 0)
        if StepFeatures.KEPT in request.features:
            event.kept = outputs["kept"][place]


def logprobs_at(
    outputs: Mapping[str, np.ndarray], place: tuple[int, ...], count: int, prefix: str = ""
) -> TokenLogprobs:
    """Returns the log-probabilities of one row, with the `count` most likely tokens, or with all (ALL_LOGPROBS)."""
    own = float(outputs[f"{prefix}logprobs"][place]), int(outputs[f"{prefix}ranks"][place])
    if count == 0:
        return TokenLogprobs(*own)
    if count == ALL_LOGPROBS:
        every = outputs["all_logprobs"][place]
        top_ids = np.argsort(-every, kind="stable")  # of equals the first comes first, as in the draw
        top_logprobs = every[top_ids]
    else:
        top_ids, top_logprobs = (outputs[f"{prefix}{name}"][place][:count] for name in ("top_ids", "top_logprobs"))
    return TokenLogprobs(*own, tuple(top_ids.tolist()), tuple(top_logprobs.tolist()))


@dataclass(slots=True)
class PooledPrompt:
    """Final hidden states of a prompt: their sum so far [E], how many, and the last [E]."""

    total: np.ndarray
    count: int
    last: np.ndarray


def collect_prompts(plan: StepPlan, outputs: Mapping[str, np.ndarray]) -> None:
    """Adds what a step returns about prompts to `request.prompt_results` of the requests that asked for it.

    That is a `PooledPrompt`, or a list with the `TokenLogprobs` of each prompt token, None for the first. A preempted
    sequence computes its prompt again, and the same results take the places of the old ones.
    """
    if "prompt_logprobs" not in outputs and "pooled_sum" not in outputs:
        return
    for shard, rows in enumerate(plan.rows):
        first = 0
        for i, row in enumerate(rows):
            request, start = row.sequence.request, row.start
            count = min(row.count, len(request.prompt) - start)
            if request.whole_prompt and row.sequence.sample_index == 0 and count > 0:
                if request.pooled:
                    total, last = outputs["pooled_sum"][shard, i], outputs["pooled_last"][shard, i]
                    before = request.prompt_results if start else None
                    if isinstance(before, PooledPrompt):
                        total = before.total + total
                    request.prompt_results = PooledPrompt(total, start + count, last)
                else:
                    _collect_logprobs(request, start, count, outputs, (shard, first))
            first += row.count


def _collect_logprobs(
    request: Request, start: int, count: int, outputs: Mapping[str, np.ndarray], place: tuple[int, int]
) -> None:
    results = request.prompt_results
    if not isinstance(results, list):
        results = request.prompt_results = list[TokenLogprobs | None]([None] * len(request.prompt))
    for i in range(min(count, len(request.prompt) - start - 1)):
        at = (place[0], place[1] + i)
        results[start + i + 1] = logprobs_at(outputs, at, request.sampling.prompt_logprobs or 0, "prompt_")


def beam_candidates(plan: StepPlan, outputs: Mapping[str, np.ndarray]) -> list[list[list[tuple[int, float]]]]:
    """Returns, per shard and row, the most likely next tokens with log-probabilities; empty for rows that are no beams."""
    ids, logprobs = outputs["beam_ids"], outputs["beam_logprobs"]
    return [
        [
            []
            if row.sequence.request.sampling.beam_width is None
            else list(zip(tokens.tolist(), values.tolist(), strict=True))
            for row, tokens, values in zip(rows, ids[shard], logprobs[shard], strict=False)
        ]
        for shard, rows in enumerate(plan.rows)
    ]
