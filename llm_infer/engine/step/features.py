"""Which step programs can run what requests need: each token bucket has a plain program, and variants that do more."""

from __future__ import annotations

from llm_infer.decoding.features import PLAIN, StepFeatures

FOR_PROMPT = StepFeatures.PROMPT_LOGPROBS | StepFeatures.POOLED
"""What rows of a prompt need, whether they draw or not; the other features are for rows that draw."""

TOLD_OF_DRAWS = StepFeatures.LOGPROBS | StepFeatures.TOP_LOGPROBS | StepFeatures.ALL_LOGPROBS | StepFeatures.KEPT
"""What a program may return of each draw beside the token."""


def serves(program: StepFeatures, needed: StepFeatures) -> bool:
    """Tells whether a program has all that is needed. One that draws several tokens has another layout and serves only that."""
    return needed in program and (program ^ needed) & StepFeatures.STEPS == PLAIN


def for_steps(features: StepFeatures) -> StepFeatures:
    """Returns the features that several decode steps in one program have, of those that requests need."""
    return (features & (TOLD_OF_DRAWS | StepFeatures.PENALTIES | StepFeatures.MASKED)) | StepFeatures.STEPS
