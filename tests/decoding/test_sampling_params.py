"""Sampling parameters are checked when they are made; the error names the parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.errors import RequestError


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
    ],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_unknown_parameters_are_an_error() -> None:
    with pytest.raises(TypeError, match="best_off"):
        SamplingParams(best_off=3)  # type: ignore[call-arg]
