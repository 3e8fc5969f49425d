"""Paths that users type and small files that they write: whatever is wrong with one becomes a UserError in a few words."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError


def typed_path(name: str | os.PathLike[str]) -> Path:
    """Returns a path with `~` replaced; a `~user` that nobody knows stays as it is, so there is no such file."""
    return Path(os.path.expanduser(name))


def is_there(name: str | os.PathLike[str]) -> bool:
    """Says whether a file or a directory has this name; one that no file can have is not there."""
    return os.path.exists(typed_path(name))


def read_text(path: str | os.PathLike[str], said: str) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: the file's.
        said: what the message of an error begins with, such as `--prompt-file FILE`.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{said}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{said} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"{said}: {error}") from None


def read_json(path: str | os.PathLike[str], said: str) -> Any:
    """Reads a JSON file; see `read_text`. Raises UserError also where it is not JSON."""
    return parsed_json(read_text(path, said), said)


def parsed_json(text: str, said: str) -> Any:
    """Returns the value that a JSON text stands for.

    Raises:
        UserError: it is not JSON, is nested too deep, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{said}: not valid JSON (half of a surrogate pair)") from None
    except ValueError as error:
        raise UserError(f"{said}: not valid JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{said}: nested too deep") from None
    return value


def read_toml(path: str | os.PathLike[str], said: str) -> dict[str, Any]:
    """Reads a TOML file; see `read_text`. Raises UserError also where it is not TOML."""
    try:
        return tomllib.loads(read_text(path, said))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{said}: {error}") from None
    except RecursionError:
        raise UserError(f"{said}: nested too deep") from None
