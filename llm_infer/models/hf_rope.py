"""Reads a rotation and its scaling from a config.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import RopeConfig
from llm_infer.models.config_keys import same
from llm_infer.models.config_numbers import MAX_FACTOR, MAX_INTEGER, MAX_THETA, positive


def read_rope(
    name: str, scaling: dict[str, Any], theta: object, fraction: object, context: Callable[[], int]
) -> RopeConfig:
    """Reads one rotation.

    Args:
        name: of the key that holds it, for messages.
        scaling: its value; keys are taken from it.
        theta, fraction: used where `scaling` does not say its own.
        context: reads the model's number of positions.

    Raises:
        ModelError: it is of a kind that is not built, or its numbers cannot be.
    """
    plain = RopeConfig(
        positive("rope_theta", scaling.pop("rope_theta", theta), MAX_THETA, 1.0),
        fraction=positive("partial_rotary_factor", scaling.pop("partial_rotary_factor", fraction), 1.0),
    )
    older = scaling.pop("type", "default")
    kind = str(scaling.pop("rope_type", older))
    if kind == "dynamic":  # sets in behind max_position_embeddings, which no sequence passes
        scaling, kind = {}, "default"
    if kind in ("longrope", "su"):
        return _longrope(name, scaling, plain, context())
    readers = {"llama3": _llama3, "yarn": partial(_yarn, context=context), "linear": _linear}
    if kind in readers and "factor" in scaling and not same(scaling["factor"], 1.0):
        result = readers[kind](name, scaling, plain)
        if scaling:
            raise ModelError(f"config.json: unknown keys in the rope scaling: {sorted(scaling)}")
        return result
    return _unscaled(plain, kind, scaling)


def _linear(name: str, scaling: dict[str, Any], plain: RopeConfig) -> RopeConfig:
    scaling.pop("original_max_position_embeddings", None)
    return replace(plain, kind="linear", factor=positive(f"{name}['factor']", scaling.pop("factor"), MAX_FACTOR, 1.0))


def _yarn(name: str, scaling: dict[str, Any], plain: RopeConfig, context: Callable[[], int]) -> RopeConfig:
    def number(key: str, default: float) -> float:
        return positive(f"{name}[{key!r}]", scaling.pop(key, default), float(MAX_INTEGER))

    factor = positive(f"{name}['factor']", scaling.pop("factor"), MAX_FACTOR, 1.0)
    # Without a number of its own, or two whose quotient counts, it follows from the factor (Peng et al., section 3.3).
    scales = [number(key, 0.0) if scaling.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    for key in ("mscale", "mscale_all_dim", "finetuned"):
        scaling.pop(key, None)
    grown = [0.1 * each * math.log(factor) + 1.0 for each in (scales if all(scales) else (1.0, 0.0))]
    original = number("original_max_position_embeddings", float(context()))
    truncate = scaling.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise ModelError(f"config.json: {name}['truncate']={truncate!r:.60}, expected true or false")
    fast, slow = number("beta_fast", 32.0), number("beta_slow", 1.0)
    if original != int(original) or fast <= slow or plain.theta == 1.0:
        raise ModelError(
            f"config.json: rope scaling 'yarn' has original_max_position_embeddings={original:g}, beta_fast={fast:g}, "
            f"beta_slow={slow:g}: expected a whole number of positions and a beta_fast above beta_slow"
        )
    return replace(
        plain,
        kind="yarn",
        factor=factor,
        original_max_position=int(original),
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        amplitude=number("attention_factor", grown[0] / grown[1]),
    )


def _longrope(name: str, scaling: dict[str, Any], plain: RopeConfig, context: int) -> RopeConfig:
    factors = {}
    for key in ("short_factor", "long_factor"):
        values = scaling.pop(key, None)
        if not isinstance(values, list) or not values or len(values) > context:
            raise ModelError(f"config.json: {name}[{key!r}]={values!r:.60}, expected a list of numbers")
        factors[key] = tuple(positive(f"{name}[{key!r}]", each, MAX_FACTOR) for each in values)
    original = positive("original_max_position_embeddings", scaling.pop("original_max_position_embeddings", context))
    factor = max(1.0, positive(f"{name}['factor']", scaling.pop("factor", context / original), MAX_FACTOR))
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    amplitude = positive(f"{name}['attention_factor']", scaling.pop("attention_factor", grown), MAX_FACTOR)
    if scaling or original != int(original) or len(set(map(len, factors.values()))) > 1:
        raise ModelError(
            f"config.json: rope scaling 'longrope' has other keys {sorted(scaling)}, lists of different lengths, or "
            f"original_max_position_embeddings={original:g}, expected a whole number"
        )
    return replace(
        plain,
        kind="longrope",
        factor=factor,
        original_max_position=int(original),
        amplitude=amplitude,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


def _llama3(name: str, scaling: dict[str, Any], plain: RopeConfig) -> RopeConfig:
    numbers = {}
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if key not in scaling:
            raise ModelError(f"config.json: rope scaling 'llama3' has no {key!r}")
        numbers[key] = positive(f"{name}[{key!r}]", scaling.pop(key), float(MAX_INTEGER))
    factor, low, high, original = numbers.values()
    if high <= low or factor < 1 or original != int(original):
        raise ModelError(
            f"config.json: rope scaling 'llama3' has factor={factor:g}, low_freq_factor={low:g}, "
            f"high_freq_factor={high:g}, original_max_position_embeddings={original:g}: expected a factor of at least "
            "1, a high one above the low one, and a whole number of positions"
        )
    return replace(
        plain, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=int(original)
    )


def _unscaled(plain: RopeConfig, kind: object, scaling: dict[str, Any]) -> RopeConfig:
    """Accepts frequencies as they are: no scaling, or one by the factor 1."""
    neutral = {"factor": 1.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    # Where the scaling would set in, which means nothing without one.
    where = {"original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "finetuned"}
    where |= {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
    known = kind == "default" or (kind in ("linear", "yarn", "llama3") and "factor" in scaling)
    if not known or not all(
        key in where or (key in neutral and same(value, neutral[key])) for key, value in scaling.items()
    ):
        raise ModelError(
            f"config.json: rope scaling {kind!r:.60} with {scaling!r:.120} is not supported, expected 'default', "
            "'llama3', 'yarn' or 'linear' with a factor, or 'longrope'"
        )
    return plain
