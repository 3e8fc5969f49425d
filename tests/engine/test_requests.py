"""What a request knows when it is made: all that follows from its parameters, rules and features."""

from __future__ import annotations

from typing import Any

import pytest

from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.engine.requests import make_request
from llm_infer.scheduler import Request


def made(params: SamplingParams, **options: Any) -> Request:
    return make_request([1, 2, 3], params, "r", vocab_size=32, eos_token_ids=frozenset({0}), seed=(1, 2), **options)


def test_a_plain_request_is_speculated_on_and_needs_nothing() -> None:
    request = made(SamplingParams(n=3))
    assert (request.features, request.rules, request.speculate, request.stepwise) == (PLAIN, None, True, False)
    assert (request.n, request.width, request.pooled, request.whole_prompt, request.prompt_only) == (
        3,
        1,
        False,
        False,
        False,
    )
    assert request.sampling.seed is not None and request.sampling.seed == made(SamplingParams()).sampling.seed


def test_beams_are_a_group() -> None:
    request = made(SamplingParams(beam_width=4))
    assert (request.n, request.width, request.features, request.speculate) == (4, 4, StepFeatures.BEAMS, False)


def test_features_say_what_is_collected_of_the_prompt() -> None:
    pooled, scored = made(SamplingParams(), pooled=True), made(SamplingParams(prompt_logprobs=1))
    assert pooled.pooled and pooled.whole_prompt and pooled.prompt_only and not pooled.speculate
    assert scored.whole_prompt and not scored.pooled and not scored.prompt_only and not scored.speculate


def test_rules_that_look_back_ask_the_host_after_each_token() -> None:
    words = SamplingParams(bad_words=("a b",))
    assert made(words, bad_words=[(7, 8)]).stepwise and not made(words, bad_words=[(7,)]).stepwise


def test_a_structure_ends_although_the_end_is_ignored() -> None:
    params = SamplingParams(ignore_eos=True, stop_token_ids=(5,))
    assert made(params).stop_ids == {5}
    structured = SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputsParams(regex="[0-9]+"))
    assert structured.stop_ids(frozenset({0})) == {0}


def test_an_option_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(TypeError, match="no option prority: expected priority, cache_salt"):
        made(SamplingParams(), prority=1)
