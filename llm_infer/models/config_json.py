"""Model configurations as JSON values and back, as checkpoints hold them."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.config_numbers import MAX_INTEGER
from llm_infer.models.registry import family

# Embeddings as wide as the model; no such expert, layers, scaling, or convolutions; nothing added to a sum.
_MAY_BE_ZERO = ("embedding_size", "shared_size", "dense_first", "query_beta", "conv_taps", "norm_epsilon")


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns all fields by name, except how it is cut over devices; nested configurations are objects, tuples are lists."""
    return _plain({name: value for name, value in dataclasses.asdict(config).items() if name not in ("shards", "own")})


def _plain(value: Any) -> Any:
    """Turns tuples into lists, in objects and lists too."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Makes the configuration that `config_to_json` wrote, of the class that the architecture's family uses.

    A field that is absent gets its default: it was added after the checkpoint was written.

    Raises:
        ModelError: unknown architecture, an unknown field (of a newer version), a missing one, or a wrong type.
    """
    module = family({"architectures": [values.get("architecture")]})
    return _build(get_type_hints(module.config)["return"], values, "config")


def _build(kind: Any, value: Any, where: str) -> Any:
    """Makes `value` an instance of the annotation `kind`."""
    if get_origin(kind) in (types.UnionType, Union):
        if value is None and type(None) in get_args(kind):
            return None
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        fields = {field.name for field in dataclasses.fields(kind)} - {"own"}
        if unknown := sorted(value.keys() - fields):
            shown = ", ".join(key if key.isprintable() else repr(key) for key in unknown)[:100]
            raise ModelError(
                f"the checkpoint's {where} has unknown fields {shown}: it was written by a newer "
                "llm_infer; update this one, or convert the model again"
            )
        required = {
            field.name
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - value.keys()):
            raise ModelError(f"the checkpoint's {where} has no {', '.join(missing)}: convert the model again")
        built = {name: _build(hints[name], each, f"{where}.{name}") for name, each in value.items()}
        for name, each in built.items():
            _check_number(each, f"{where}.{name}", zero=name in _MAY_BE_ZERO)
        return kind(**built)  # type: ignore[operator]
    if get_origin(kind) is tuple and isinstance(value, list):
        items = get_args(kind)
        each_kind = [items[0]] * len(value) if items[-1] is Ellipsis else items
        if len(each_kind) == len(value):
            return tuple(_build(k, v, where) for k, v in zip(each_kind, value, strict=True))
    if kind is float and type(value) is int and abs(value) <= MAX_INTEGER:
        return float(value)
    if kind in (bool, int, float, str) and type(value) is kind:
        return value
    raise ModelError(f"the checkpoint's {where} is {value!r:.60}, expected {kind}: convert the model again")


def _check_number(value: Any, where: str, *, zero: bool) -> None:
    """Raises ModelError for a size, a base or an epsilon that no model has."""
    if type(value) not in (int, float) or (zero and value == 0):
        return
    if not (0 < value < math.inf) or (type(value) is int and value > MAX_INTEGER):
        raise ModelError(
            f"the checkpoint's {where} is {value!r:.60}, expected a positive number: convert the model again"
        )
    if where.endswith(".norm_eps") and value > 1:
        raise ModelError(f"the checkpoint's {where} is {value!r}, expected at most 1: convert the model again")
