"""Defaults of one user, in a file: the model, how to draw, what to show. Flags that are typed go before them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args, get_origin

from llm_infer.base.errors import UserError
from llm_infer.base.files import read_toml, typed_path
from llm_infer.base.settings import by_name
from llm_infer.commands.completion import nearest
from llm_infer.commands.sampling import FLAGS
from llm_infer.options import EngineOptions, settings

VARIABLE = "LLM_INFER_CONFIG"
COMMANDS = ("generate", "chat")
"""Commands that take these defaults; a table of either name in the file is for it alone."""

OWN = {"system": str, "raw": bool, "threads": int, "config": str, "verbose": bool, "quiet": bool}
KINDS = {**OWN, **{flag.name: flag.kind for flag in FLAGS}}
"""Flags of these commands that are no settings of the engine, and types of their values; `config` names a file of settings."""


def user_file() -> Path | None:
    """Returns the user's file, or None if there is none.

    `LLM_INFER_CONFIG` (empty: none), else `$XDG_CONFIG_HOME/llm_infer/config.toml`, else `~/.config/llm_infer/config.toml`.

    Raises:
        UserError: LLM_INFER_CONFIG names a file that is not there.
    """
    if (named := os.environ.get(VARIABLE)) is not None:
        if not named:
            return None
        path = typed_path(named)
        if not os.path.isfile(path):
            raise UserError(f"{VARIABLE}={named}: there is no such file")
        return path
    path = standard_place()
    return path if path.is_file() else None


def standard_place() -> Path:
    """Returns where the user's file is looked for."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "llm_infer" / "config.toml"


def user_defaults() -> dict[str, dict[str, Any]]:
    """Returns the defaults of each command in the user's file.

    Raises:
        UserError: the file cannot be read, is not TOML, or has a key that is unknown.
    """
    path = user_file()
    if path is None:
        return {}
    values = read_toml(path, str(path))
    tables = {name: values.pop(name, {}) for name in COMMANDS}
    if isinstance(tables["chat"], dict) and "raw" in tables["chat"]:
        raise UserError(f"{path}: raw is a flag of generate alone: it cannot stand in [chat]")
    shared = _checked(path, values)
    return {name: shared | _checked(path, table, name) for name, table in tables.items()}


def _checked(path: Path, values: Any, table: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{path}: {table} is {values!r:.60}, expected a table [{table}]")
    try:
        return _settings(values) | {
            name: _own(path, name, value) for key, value in values.items() if (name := key.replace("-", "_")) in KINDS
        }
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the values that are settings of the engine, as in a file of `--config`."""
    rest = {key: value for key, value in values.items() if key.replace("-", "_") not in KINDS}
    for key in rest:
        near = nearest(key.replace("-", "_"), list(KINDS))
        if near is not None and key.replace("-", "_") not in settings():
            raise UserError(f"{key!r} is no flag of generate and chat: did you mean {near.replace('_', '-')}?")
    found = by_name(EngineOptions, rest)
    return {name: settings()[name].checked(value) for name, value in found.items()}


def _own(path: Path, name: str, value: Any) -> Any:
    """Returns a value of one of KINDS, as its flag takes it."""
    kind = KINDS[name]
    element = get_args(kind)[0] if get_origin(kind) is list else kind
    several = value if isinstance(value, list) and element is not kind else [value]
    accepted = (int, float) if element is float else element
    if not all(isinstance(each, accepted) and (element is bool or not isinstance(each, bool)) for each in several):
        raise UserError(f"{name.replace('_', '-')} = {value!r:.60}: expected {_ENGLISH[element]}")
    if name == "config":  # beside this file, not beside whatever the user works on
        return str(path.parent / typed_path(str(value)))
    return several if element is not kind else value


_ENGLISH = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
