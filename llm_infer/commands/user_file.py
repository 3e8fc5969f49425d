"""Defaults of one user, in a file: the model, how to draw, what to show. Flags that are typed go before them."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.commands.completion import nearest
from llm_infer.commands.sampling import FLAGS

VARIABLE = "LLM_INFER_CONFIG"
COMMANDS = ("generate", "chat")
"""Commands that take these defaults; a table of either name in the file is for it alone."""

NAMES = ("model", "system", "raw", "threads", "config", "verbose", "quiet", *(flag.name for flag in FLAGS))
"""What may be set: flags that are no engine arguments, of which `config` names a file."""

_LISTS = [flag.name for flag in FLAGS if flag.kind not in (str, int, float, bool)]


def user_file() -> Path | None:
    """Returns the user's file, or None if there is none.

    `LLM_INFER_CONFIG` (empty: none), else `$XDG_CONFIG_HOME/llm_infer/config.toml`, else `~/.config/llm_infer/config.toml`.

    Raises:
        UserError: LLM_INFER_CONFIG names a file that is not there.
    """
    if (named := os.environ.get(VARIABLE)) is not None:
        if not named:
            return None
        path = Path(named).expanduser()
        if not path.is_file():
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
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    tables = {name: values.pop(name, {}) for name in COMMANDS}
    shared = _checked(path, values)
    return {name: shared | _checked(path, table, name) for name, table in tables.items()}


def _checked(path: Path, values: Any, table: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{path}: {table} is {values!r:.60}, expected a table [{table}]")
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in NAMES:
            near = nearest(name, list(NAMES))
            hint = f"did you mean {near.replace('_', '-')}? " if near else ""
            raise UserError(
                f"{path}: {key!r} is no default of generate and chat; {hint}Settings of the engine stand in a file of "
                "their own, which `config` names here as --config does on the command line"
            )
        if name == "config":  # beside this file, not beside whatever the user works on
            value = str(path.parent / Path(str(value)).expanduser())
        result[name] = [value] if name in _LISTS and not isinstance(value, list) else value
    return result
