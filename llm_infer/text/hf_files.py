"""Reads what the files beside a Hugging Face tokenizer.json say about its tokens, and checks every value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llm_infer.base.errors import ModelError

T = TypeVar("T")

SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Tokens that configurations name one by one (`bos_token` …); they are special."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads the JSON object in a file; it is empty when there is no such file.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}: expected a JSON object")
    return content


def read_template(file: Path) -> str:
    """Reads a Jinja file.

    Raises:
        ModelError: the file cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 (byte {error.start}): expected a Jinja template as text") from None


def token_text(config: Mapping[str, Any], key: str) -> str | None:
    """Returns the text of a token, which is given as null, a string, or an object with a string `content`.

    Raises:
        ModelError: the entry is something else.
    """
    entry = config.get(key)
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and (not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text)):
        raise ModelError(f"tokenizer_config.json: {key}={entry!r:.60}, expected the text of a token or null")
    return text


def special_texts(config: Mapping[str, Any]) -> set[str]:
    """Returns the texts of further tokens that tokenizer_config.json or special_tokens_map.json call special.

    Raises:
        ModelError: an entry is of the wrong kind.
    """
    texts: set[str | None] = set()
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        entry = config.get(key) or []
        if not isinstance(entry, list | dict):
            raise ModelError(f"tokenizer_config.json: {key}={entry!r:.60}, expected tokens or null")
        listed = entry.values() if isinstance(entry, dict) else entry
        if key == "added_tokens_decoder":
            listed = [token for token in listed if isinstance(token, dict) and token.get("special") is True]
        texts.update(token_text({key: token}, key) for token in listed)
    return {text for text in texts if text}


def token_ids(file: Path, config: Mapping[str, Any], key: str, vocab_size: int) -> list[int]:
    """Returns the ids that a configuration file names, given as null, one id, or a list.

    Raises:
        ModelError: one of them is not an id below `vocab_size`.
    """
    entry = config.get(key)
    ids = entry if isinstance(entry, list) else [] if entry is None else [entry]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ModelError(f"{file}: {key}={entry!r:.60}, expected ids of tokens below {vocab_size}, or null")
    return ids


def guarded(call: Callable[[], T], problem: str) -> T:
    """Returns the result of a call into the tokenizers library.

    Raises:
        ModelError: the call raised, which it does with a plain Exception, or panicked, which is no Exception at all.
    """
    try:
        return call()
    except ModelError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{problem}: {' '.join(str(error).split())[:200]}") from None
