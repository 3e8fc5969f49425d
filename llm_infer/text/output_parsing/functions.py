"""The functions that a model may call, as requests name them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_infer.base.errors import RequestError

MAX_FUNCTIONS = 128
"""Most functions of a request."""

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call.

    Attributes:
        name: what calls name it.
        parameters: JSON schema of its arguments; None if it has none.
        strict: whether calls are held to the schema also where the model may answer without a call.
        where: its place in the request, for errors.
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    where: str = "tools[0].function"


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Function]:
    """Returns the functions of `tools` (`[{"type": "function", "function": {"name": …, "parameters": …}}, …]`) by name.

    Raises:
        RequestError: one is malformed, two have the same name, or there are too many.
    """
    if len(tools) > MAX_FUNCTIONS:
        raise RequestError(f"tools has {len(tools)} entries, the limit is {MAX_FUNCTIONS}")
    found: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        where = f"tools[{index}].function"
        given = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(given, Mapping):
            raise RequestError(f"tools[{index}]: expected {{'type': 'function', 'function': {{'name': …}}}}")
        name, parameters, strict = given.get("name"), given.get("parameters"), given.get("strict")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(f"{where}.name={name!r:.60}: expected 1 to 128 of letters, digits and . : / _ -")
        if name in found:
            raise RequestError(f"{where}.name={name!r:.60} is there twice: give each function a name of its own")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"{where}.parameters={parameters!r:.60}: expected a JSON schema, an object")
        if strict is not None and not isinstance(strict, bool):
            raise RequestError(f"{where}.strict={strict!r:.60}: expected true or false")
        found[name] = Function(name, parameters, bool(strict), where)
    return found
