"""What a step returns beside ids, brought into the form that events carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.features import StepFeatures, features_of
from llm_infer.scheduler.plan import StepPlan
from llm_infer.scheduler.request import TokenEvent, TokenLogprobs


def attach_logprobs(events: Iterable[TokenEvent], plan: StepPlan, outputs: Mapping[str, np.ndarray]) -> None:
    """Gives the events of requests that asked for them their log-probabilities; `outputs` are those of the step."""
    places = {row.sequence: (shard, i) for shard, rows in enumerate(plan.rows) for i, row in enumerate(rows)}
    for event in events:
        params = event.sequence.request.sampling
        assert isinstance(params, SamplingParams)
        if StepFeatures.LOGPROBS in features_of(params):
            event.logprobs = logprobs_at(outputs, places[event.sequence], params.logprobs or 0)


def logprobs_at(outputs: Mapping[str, np.ndarray], place: tuple[int, int], count: int) -> TokenLogprobs:
    """The log-probabilities of one row, with the `count` most likely tokens."""
    return TokenLogprobs(
        float(outputs["logprobs"][place]),
        int(outputs["ranks"][place]),
        tuple(outputs["top_ids"][place][:count].tolist()),
        tuple(outputs["top_logprobs"][place][:count].tolist()),
    )


def beam_candidates(plan: StepPlan, outputs: Mapping[str, np.ndarray]) -> list[list[list[tuple[int, float]]]]:
    """Per shard and row the most likely next tokens and their log-probabilities; empty for rows that are no beams."""
    ids, logprobs = outputs["beam_ids"], outputs["beam_logprobs"]
    return [
        [
            [] if row.sequence.request.beams is None else list(zip(tokens.tolist(), values.tolist(), strict=True))
            for row, tokens, values in zip(rows, ids[shard], logprobs[shard], strict=False)
        ]
        for shard, rows in enumerate(plan.rows)
    ]
