"""Sampling parameters are checked when they are made; the error names the parameter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llm_infer.base.errors import RequestError
from llm_infer.decoding.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("n", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("stop_token_ids", (-1,)),
        ("best_of", 0),
        ("min_p", 1.5),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", math.nan),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", [3]),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", "12"),
        ("bad_words", [""]),
        ("stop", 3),
        ("stop", ["a", ""]),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("truncate_prompt_tokens", 0),
        ("skip_special_tokens", 1),
        ("include_stop_str_in_output", True),
        ("max_tokens", np.float32(5)),
        ("max_tokens", np.array([5])),
        ("n", np.bool_(True)),
        ("temperature", np.array([0.5, 0.6])),
        ("temperature", np.float32("nan")),
        ("stop_token_ids", np.array([[1]])),
        ("stop_token_ids", np.array(1)),
        ("stop", np.array([1])),
        ("logit_bias", {3: np.array([1.0, 2.0])}),
        ("beam_width", np.array([1, 2])),
        ("early_stopping", np.array([1, 2])),
        ("skip_special_tokens", np.array([1, 2])),
    ],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_unknown_parameters_are_an_error() -> None:
    with pytest.raises(TypeError, match="best_off"):
        SamplingParams(best_off=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n": 3, "best_of": 2}, "best_of=2 is below n=3"),
        ({"best_of": 2, "temperature": 0.0}, "best_of=2 with temperature=0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above max_tokens=8"),
    ],
)
def test_contradictions_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**values)


def test_numbers_of_numpy_become_python_s() -> None:
    given: dict[str, Any] = {
        "n": np.int8(2),
        "temperature": np.float32(0.5),
        "top_p": np.float64(0.9),
        "min_p": np.float16(0.25),
        "seed": np.int32(3),
        "max_tokens": np.int64(5),
        "logprobs": np.array(3),
        "ignore_eos": np.bool_(True),
        "stop": np.array(["a", "b"]),
        "stop_token_ids": np.array([1, 2]),
        "allowed_token_ids": [np.int64(3)],
        "logit_bias": {np.int64(4): np.float32(2)},
    }
    params = SamplingParams(**given)
    lists = {"stop": ("a", "b"), "stop_token_ids": (1, 2), "allowed_token_ids": (3,), "logit_bias": {4: 2.0}}
    scalars = {name: value.item() for name, value in given.items() if name not in lists}
    expected = SamplingParams(**scalars, **lists)
    assert repr(params) == repr(expected) and "np." not in repr(params)


def test_forms_of_the_openai_api() -> None:
    nothing: Any = dict.fromkeys(("stop", "stop_token_ids", "bad_words", "logit_bias", "seed", "logprobs"))
    assert SamplingParams(**nothing) == SamplingParams()
    params = SamplingParams(stop="end", logit_bias={"12": 3}, stop_token_ids=[4], bad_words=["a"])  # type: ignore[arg-type,dict-item]
    assert params.stop == ("end",) and params.logit_bias == {12: 3.0} and params.stop_token_ids == (4,)
    assert hash(params) == hash(SamplingParams(stop="end", logit_bias={12: 1.0}, stop_token_ids=(4,), bad_words=("a",)))
