"""Checks numbers and objects of a config.json."""

from __future__ import annotations

import math
from typing import Any

from llm_infer.base.errors import ModelError

LARGEST = 1e300
"""Above it whole numbers may be none that a float holds."""
MAX_INTEGER = 2**31 - 1
"""Largest size or position: programs count in int32."""
MAX_THETA = 1e15
"""Published bases of rotary frequencies end at 5e10."""
MAX_LAYERS = 100_000
"""Published models end at 126."""
MAX_FACTOR = 1e6
"""Published factors by which a context grows end at 128."""


def positive(key: str, value: object, high: float = math.inf, low: float = 0.0) -> float:
    """Returns the value as a finite number above 0, from `low` to `high`.

    Raises:
        ModelError: the value is something else.
    """
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not (0 < value < LARGEST and low <= value <= high):  # type: ignore[operator]
        limits = f", from {low:g} to {high:g}" if high < math.inf else ""
        raise ModelError(f"config.json: {key}={value!r:.60}, expected a finite positive number{limits}")
    return float(value)  # type: ignore[arg-type]


def an_object(name: str, value: object) -> dict[str, Any]:
    """Returns a JSON object without its nulls, which say that a key is not set.

    Raises:
        ModelError: the value is something else.
    """
    if not isinstance(value, dict):
        raise ModelError(f"config.json: {name}={value!r:.60}, expected an object or null")
    return {key: each for key, each in value.items() if each is not None}
