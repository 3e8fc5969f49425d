"""What a sequence brings unchanged to every step, one number per field: the one table of these fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from llm_infer.scheduler.request import Sequence


@dataclass(frozen=True, slots=True)
class RowField:
    """A field [R] of the step's buffer.

    Attributes:
        name: in the buffer, and in `SamplingRows` or `PenaltyRows`, which say what it means.
        dtype: of its numbers.
        value: reads it from a sequence, when the sequence gets its slot.
        neutral: stands in rows of the buffer that no sequence has.
    """

    name: str
    dtype: type[np.float32 | np.int32]
    value: Callable[[Sequence], float]
    neutral: float = 0


def _parameter(name: str, sequence: Sequence) -> float:
    return getattr(sequence.request.sampling, name)


def _number(name: str, dtype: type[np.float32 | np.int32] = np.float32, neutral: float = 0) -> RowField:
    return RowField(name, dtype, partial(_parameter, name), neutral)


def _has_bias(sequence: Sequence) -> int:
    return bool(sequence.request.sampling.logit_bias)


def _seed_word(shift: int, sequence: Sequence) -> int:
    """Reads 32 bits of the seed as a signed number."""
    seed = sequence.request.sampling.seed
    assert seed is not None, "a request that runs has a seed"
    word = (seed >> shift) & 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _sample_index(sequence: Sequence) -> int:
    return sequence.sample_index


ROW_FIELDS = (
    _number("temperature"),
    _number("top_p"),
    _number("top_k", np.int32),
    _number("min_p"),
    _number("typical_p"),
    RowField("seed_high", np.int32, partial(_seed_word, 32)),
    RowField("seed_low", np.int32, partial(_seed_word, 0)),
    RowField("sample_index", np.int32, _sample_index),
    _number("repetition_penalty", neutral=1.0),
    _number("presence_penalty"),
    _number("frequency_penalty"),
    RowField("has_bias", np.int32, _has_bias),
)
