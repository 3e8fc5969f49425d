"""Rewrites JSON schemas so that llguidance follows them exactly; refuses what it would round or count wrongly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from llm_infer.base.errors import RequestError
from llm_infer.decoding.formats import PATTERNS

_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose values are schemas by name: the names are no keywords."""

_NOTES = frozenset({"title", "description", "default", "example", "examples", "$comment"})
"""Keywords that constrain nothing: they are left out, whatever their values."""

_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})

_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that only \\u escapes can write: with those, a key would have several spellings (`JSON_FORM`)."""

MAX_BOUND = 2**53
"""Largest number that a bound may let in: beyond it llguidance, which computes in doubles, cannot tell neighbours apart."""


def parse_schema(text: str) -> Any:
    """Returns the values of JSON text; numbers keep all their digits.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(text, parse_float=Decimal)


def exact_schema(schema: Any) -> Any:
    """Writes a schema for llguidance that accepts nothing that the given one does not.

    Numbers must keep their values as doubles, formats become patterns, and `minProperties` must not depend on
    keys being different, which a grammar cannot tell.

    Raises:
        RequestError: it asks for something that would not be followed exactly.
    """
    return _schema(schema, "#")


def _schema(node: Any, path: str) -> Any:
    if isinstance(node, list | tuple):
        return [_schema(each, f"{path}/{i}") for i, each in enumerate(node)]
    if not isinstance(node, Mapping):
        return _number(node, path)
    new: dict[str, Any] = {}
    for key, value in node.items():
        here = f"{path}/{key}"
        if key in _NAMED and isinstance(value, Mapping):
            new[key] = {name: _schema(each, f"{here}/{name}") for name, each in value.items()}
        elif key not in _NOTES:
            new[key] = (_constant if key in ("const", "enum") else _schema)(value, here)
        if key in _BOUNDS and isinstance(new[key], int | float):
            _check_bound(key, new[key], here)
    if isinstance(new.get("format"), str):
        _replace_format(new, path)
    _check_count(new, path)
    return new


def _check_bound(key: str, bound: float, path: str) -> None:
    if abs(bound) > MAX_BOUND - key.startswith("exclusive"):
        raise _refusal(path, bound, f"bounds are exact up to {MAX_BOUND} (2^53), exclusive ones below: change it")


def _constant(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {_constant(key, path): _constant(each, f"{path}/{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_constant(each, f"{path}/{i}") for i, each in enumerate(value)]
    if isinstance(value, str) and _UNWRITABLE.search(value):
        raise _refusal(path, json.dumps(value), "outputs hold no control characters but \\b, \\t, \\n, \\f and \\r")
    return _number(value, path)


def _number(value: Any, path: str) -> Any:
    """Returns the value; for a number, only if the double in its printed digits is the same."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    try:
        kept = Decimal(repr(float(value)))
    except OverflowError:
        kept = Decimal("inf")
    if not kept.is_finite() or kept != (Decimal(repr(value)) if isinstance(value, float) else Decimal(value)):
        raise _refusal(path, value, f"numbers are doubles, this one would become {kept}: give one with fewer digits")
    return float(value) if isinstance(value, Decimal) else value


def _replace_format(node: dict[str, Any], path: str) -> None:
    """Writes a format as patterns, beside those that the node has."""
    name, types = node.pop("format"), node.get("type", "string")
    if isinstance(types, str | list | tuple) and "string" not in ([types] if isinstance(types, str) else types):
        return  # formats concern strings alone
    if name not in PATTERNS:
        raise _refusal(f"{path}/format", name, f"expected one of {', '.join(sorted(PATTERNS))}: leave it out")
    others = node.get("allOf", [])
    if isinstance(others, list):
        node["allOf"] = [*others, *({"pattern": pattern} for pattern in PATTERNS[name])]


def _check_count(node: Mapping[str, Any], path: str) -> None:
    """Refuses a least number of keys that one key, written several times, could reach."""
    least, required = node.get("minProperties", 0), node.get("required", [])
    sure = len({name for name in required if isinstance(name, str)}) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(1, sure):
        why = f"an output could repeat a key to reach it: name at least {least} keys in required, or leave it out"
        raise _refusal(f"{path}/minProperties", least, why)


def _refusal(path: str, value: object, why: str) -> RequestError:
    return RequestError(f"structured_outputs.json: {path} = {value!s:.60}: {why}")
