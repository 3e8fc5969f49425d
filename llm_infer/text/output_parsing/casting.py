"""Which values a parameter takes, and from the bare text that some formats write to a JSON value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llm_infer.text.output_parsing.literals import json_text

Schema = Mapping[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def parameter_schema(parameters: Schema | None, name: str) -> Schema:
    """Returns the schema of one parameter; {} if nothing is known about it."""
    known = (parameters or {}).get("properties")
    found = known.get(name) if isinstance(known, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def is_bare(schema: Schema) -> bool:
    """Checks whether a parameter's values are all strings, so that formats with bare values write them without quotes."""
    if schema.get("type") in ("string", ["string"]):
        return True
    if "type" in schema:
        return False
    constants = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return bool(constants) and isinstance(constants, list) and all(isinstance(each, str) for each in constants)


def cast(text: str, schema: Schema) -> str:
    """Returns the JSON text of the value that a model wrote as `text`.

    A parameter whose values are strings gets the text. For all others it is JSON, or Python's True, False and None, if that is
    of the parameter's type; whatever else was written is a string.
    """
    if is_bare(schema):
        return json_text(text)
    stripped = text.strip()
    stripped = {"True": "true", "False": "false", "None": "null"}.get(stripped, stripped)
    try:
        value = json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json_text(text)
    return stripped if _has_type(value, schema) else json_text(text)


def _has_type(value: object, schema: Schema) -> bool:
    """Checks the type alone; a schema that does not say it takes any."""
    given = schema.get("type")
    types = [given] if isinstance(given, str) else given
    if not isinstance(types, list) or not all(isinstance(each, str) and each in _TYPES for each in types):
        return True
    if not isinstance(value, str) and "string" not in types:
        return True  # nothing better is there: the call's receiver says what is wrong
    kinds = tuple(kind for each in types for kind in _TYPES[each])
    return isinstance(value, kinds) and not (isinstance(value, bool) and "boolean" not in types)


def _refuse(word: str) -> None:
    raise ValueError(word)
