"""Builds grammars in llguidance's dialect of Lark: literals, special tokens, JSON values, and text up to a marker."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_infer.base.errors import RequestError
from llm_infer.decoding.formats import PATTERNS
from llm_infer.decoding.grammar import JSON_FORM
from llm_infer.decoding.structured import StructuredOutputsParams

ANY = "(?s:.*)"
"""A regular expression for any text."""


class Lark:
    """A grammar that grows rule by rule.

    Args:
        special_tokens: text → id of the tokens that stand for themselves and not for text.
    """

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._ids = special_tokens
        texts = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None
        self._lines: list[str] = []
        self._names: dict[str, str] = {}

    def finish(self, start: str) -> str:
        """Returns the grammar with this beginning."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._lines]) + "\n"

    def rule(self, expression: str) -> str:
        """Returns the name of a rule; equal ones are one."""
        return self._named("r", "", expression)

    def literal(self, text: str) -> str:
        """Returns an expression for exactly this text; empty for none."""
        parts = self._special.split(text) if self._special else [text]
        return " ".join(self._part(part) for part in parts if part)

    def json(self, schema: Mapping[str, Any], where: str) -> str:
        """Returns an expression for a value of a JSON schema.

        Raises:
            RequestError: the schema asks for something that would not be followed exactly.
        """
        try:
            checked = StructuredOutputsParams(json=schema).json
        except RequestError as error:
            raise RequestError(f"{where}: {str(error).removeprefix('structured_outputs.json: ')}") from None
        assert isinstance(checked, str), "kept as text"
        return self.rule("%json " + json.dumps({**json.loads(checked), "x-guidance": JSON_FORM}))

    def until(self, end: str, bodies: Sequence[str] = (f"/{ANY}/",)) -> str:
        """Returns an expression for text and `end` after it, which the text does not hold.

        Args:
            bodies: expressions of terminals; the text matches all of them.
        """
        before, *special = self._special.split(end, maxsplit=1) if self._special else [end]
        body = " & ".join(f"({each})" for each in bodies)
        marker = exactly(end.strip())
        if special:  # text cannot hold the special token, but spell it
            body = f"({body}) /{exactly(before)}/" if before else f"({body})"
            return f"{self._named('T', '', f'({body}) & ~/{ANY}{marker}{ANY}/')} {self.literal(''.join(special))}"
        terminal = self._named("T", "", f"(({body}) /{exactly(end)}/) & ~/{ANY}{marker}(?s:.+)/")
        return self._named("r", "[lazy]", terminal)

    def text(self, without: str = "", beginning: str = "") -> str:
        """Returns an expression for text without a marker; `beginning`: an expression that it matches."""
        parts = [f"/{beginning or ANY}/"]
        if without:
            parts.append(f"~/{ANY}{exactly(without)}{ANY}/")
        return self._named("T", "", " & ".join(parts))

    def _part(self, part: str) -> str:
        return f"<[{self._ids[part]}]>" if part in self._ids else json.dumps(part, ensure_ascii=False)

    def _named(self, kind: str, attributes: str, expression: str) -> str:
        key = f"{kind}{attributes}: {expression}"
        if key not in self._names:
            name = f"{kind}{len(self._names)}" if kind == "r" else f"{kind}_{len(self._names)}"
            self._names[key] = name
            self._lines.append(f"{name}{attributes}: {expression}")
        return self._names[key]


def exactly(text: str) -> str:
    """Returns a regular expression for exactly this text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def string_bodies(schema: Mapping[str, Any], where: str) -> list[str]:
    """Returns expressions of terminals for text without quotes; all of them together match the strings of a schema.

    Raises:
        RequestError: a keyword of the schema cannot be followed.
    """
    for key, value in schema.items():
        if key not in _STRING_KEYS:
            raise RequestError(f"{where}.{key}: this model's form of tool calls cannot force it: leave it out")
        if (kind := _STRING_KEYS[key]) and (not isinstance(value, kind) or isinstance(value, bool)):
            raise RequestError(f"{where}.{key}={value!r:.60}: expected {_WORDS[kind]}")
    constants = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if constants is not None:
        texts = [each for each in constants if isinstance(each, str)]
        if not texts:
            raise RequestError(f"{where}.enum={constants!r:.60}: expected at least one text")
        return [f"/{'|'.join(map(exactly, texts))}/"]
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    bodies = [f"/(?s:.{{{least},{most}}})/"] if least or most != "" else [f"/{ANY}/"]
    if "format" in schema and schema["format"] not in PATTERNS:
        names = ", ".join(sorted(PATTERNS))
        raise RequestError(f"{where}.format={schema['format']!r:.60}: expected one of {names}: leave it out")
    patterns = [*([schema["pattern"]] if "pattern" in schema else []), *PATTERNS.get(schema.get("format", ""), ())]
    return bodies + [_searched(pattern) for pattern in patterns]


_NOTES = ("title", "description", "default", "example", "examples", "$comment")
_STRING_KEYS: dict[str, type | None] = {
    **dict.fromkeys((*_NOTES, "type", "const")),
    "enum": list,
    "minLength": int,
    "maxLength": int,
    "pattern": str,
    "format": str,
}
"""Keywords of schemas for strings that are understood, and the types of their values where these matter."""

_WORDS: dict[type, str] = {list: "a list", int: "a whole number", str: "a text"}


def _searched(pattern: str) -> str:
    """Returns an expression for texts in which `pattern` is found; it stands alone, so that it must be whole."""
    before = "" if pattern.startswith("^") else f"/{ANY}/"
    closed = re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern)
    after = "" if closed else f"/{ANY}/"
    inner = pattern.removeprefix("^")[: -1 if closed else None].replace("\n", "\\n") or "(?:)"
    inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", inner)
    return f"{before} /{inner}/ {after}"
