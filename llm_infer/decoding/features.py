"""What requests need of the steps that run them, beside the plain draw of a token: features of step programs."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from llm_infer.decoding.sampling_params import ALL_LOGPROBS, SamplingParams


class StepFeatures(enum.Flag):
    """Features of a step program; the plain one has none. Rows that need no feature may run in any variant.

    Attributes:
        LOGPROBS: returns log-probabilities and ranks of the drawn tokens.
        TOP_LOGPROBS: returns the most likely tokens and theirs, too.
        KEPT: returns which tokens the limits of sampling keep.
        ALL_LOGPROBS: returns those of all tokens, too.
        PENALTIES: applies penalties and biases, whose per-slot state is kept on the device.
        MASKED: takes a bit mask of the allowed tokens of each row.
        PROMPT_LOGPROBS: returns log-probabilities of the tokens that follow each token of the step.
        POOLED: returns the final hidden states of each row's tokens, their sum and the last.
        BEAMS: returns the most likely tokens with their log-probabilities, as many as a beam search may need.
        DRAFTS: draws after proposed tokens too, so it has more rows of logits than sequences.
        STEPS: draws several tokens for each row, one after the other.
    """

    LOGPROBS = enum.auto()
    PENALTIES = enum.auto()
    MASKED = enum.auto()
    PROMPT_LOGPROBS = enum.auto()
    POOLED = enum.auto()
    BEAMS = enum.auto()
    DRAFTS = enum.auto()
    STEPS = enum.auto()
    ALL_LOGPROBS = enum.auto()
    TOP_LOGPROBS = enum.auto()
    KEPT = enum.auto()

    @property
    def words(self) -> list[str]:
        """What the features are for, for the user."""
        return [_WORDS[feature] for feature in self]


PLAIN = StepFeatures(0)

_WORDS = {
    StepFeatures.LOGPROBS: "log-probabilities",
    StepFeatures.PENALTIES: "penalties and biases",
    StepFeatures.MASKED: "allowed tokens",
    StepFeatures.PROMPT_LOGPROBS: "log-probabilities of prompts",
    StepFeatures.POOLED: "embeddings",
    StepFeatures.BEAMS: "beams",
    StepFeatures.DRAFTS: "proposed tokens",
    StepFeatures.STEPS: "several tokens a step",
    StepFeatures.ALL_LOGPROBS: "log-probabilities of all tokens",
    StepFeatures.TOP_LOGPROBS: "most likely tokens",
    StepFeatures.KEPT: "tokens kept by limits",
}


def features_of(params: SamplingParams, *, pooled: bool = False) -> StepFeatures:
    """Returns what steps need for a request with these parameters."""
    if params.beam_width is not None:
        return StepFeatures.BEAMS  # nothing is drawn
    needed = StepFeatures.POOLED if pooled else PLAIN
    if params.prompt_logprobs is not None:
        needed |= StepFeatures.PROMPT_LOGPROBS
    if params.logprobs is not None or params.num_sequences > params.n:
        needed |= StepFeatures.LOGPROBS
    if params.logprobs:
        needed |= StepFeatures.ALL_LOGPROBS if params.logprobs == ALL_LOGPROBS else StepFeatures.TOP_LOGPROBS
    if params.kept_tokens:
        needed |= StepFeatures.KEPT
    if params.has_penalties or params.logit_bias:
        needed |= StepFeatures.PENALTIES
    if params.allowed_token_ids is not None or params.bad_words or params.min_tokens or params.structured_outputs:
        needed |= StepFeatures.MASKED
    return needed


def union(features: Iterable[StepFeatures]) -> StepFeatures:
    """Returns all of these features."""
    result = PLAIN
    for each in features:
        result |= each
    return result
