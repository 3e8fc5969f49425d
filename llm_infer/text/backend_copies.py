"""Copies of a tokenizer that read texts differently: literally, or as the continuation of a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers


def copy_of(backend: tokenizers.Tokenizer, *, parse_special: bool, begins: bool) -> tokenizers.Tokenizer:
    """Returns a copy of `backend` that reads texts so.

    Args:
        backend: the tokenizer to copy; it stays as it is.
        parse_special: takes the text of a special token for that token, not for plain text.
        begins: whether a text begins a whole one, so that it gets the space that SentencePiece puts there.
    """
    text = backend.to_str()
    if not begins:
        state = json.loads(text)
        _leave_out_first_space(state)
        text = json.dumps(state, ensure_ascii=False)
    copy = tokenizers.Tokenizer.from_str(text)
    copy.encode_special_tokens = not parse_special
    return copy


def _leave_out_first_space(state: dict[str, Any]) -> None:
    """Removes from a tokenizer.json what puts a space before a text."""
    if any(step["type"] == "Prepend" for step in _steps(state["normalizer"], "normalizers")):
        rest = [step for step in _steps(state["normalizer"], "normalizers") if step["type"] != "Prepend"]
        state["normalizer"] = {"type": "Sequence", "normalizers": rest}
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False


def _steps(step: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    if step is not None and step["type"] == "Sequence":
        for one in step[inner]:
            yield from _steps(one, inner)
    elif step is not None:
        yield step
