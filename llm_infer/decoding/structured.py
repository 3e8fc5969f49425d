"""The form that an output must have: JSON schema, JSON object, regular expression, choice or grammar; names as in vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_infer.base.errors import RequestError
from llm_infer.decoding.schemas import exact_schema, parse_schema

MAX_CHARS = 1 << 16
"""Longest schema, expression or grammar in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an output must have; exactly one field is given.

    Attributes:
        json: a JSON schema, as text or as Python objects; kept as text in the form that the compiler takes.
        json_object: whether any JSON object will do.
        regex: a regular expression that the whole output matches (Rust syntax, no look-around).
        choice: one of these texts.
        grammar: a context-free grammar in Lark's notation, with a rule `start`.

    Raises:
        RequestError: none or several are given, or one is not of its kind or too long.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise RequestError(
                f"structured_outputs: give one of json, json_object, regex, choice, grammar; found {found}"
            )
        if not isinstance(self.json_object, bool):
            raise RequestError(f"structured_outputs.json_object={self.json_object!r:.60}: expected True or False")
        if self.choice is not None:
            texts = list(self.choice) if isinstance(self.choice, Sequence) and not isinstance(self.choice, str) else []
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise RequestError(f"structured_outputs.choice={self.choice!r:.60}: expected texts that are not empty")
            object.__setattr__(self, "choice", tuple(texts))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise RequestError(f"structured_outputs.{name}={value!r:.60}: expected a text that is not empty")
        if self.json is not None:
            object.__setattr__(self, "json", self._schema_text())
        if self.size > MAX_CHARS:
            raise RequestError(f"structured_outputs.{self.kind} has {self.size} characters, the limit is {MAX_CHARS}")

    def _schema_text(self) -> str:
        try:
            schema = parse_schema(self.json) if isinstance(self.json, str) else self.json
            if not isinstance(schema, Mapping):
                raise RequestError(f"structured_outputs.json={schema!r:.60}: expected a JSON schema, an object")
            return json.dumps(exact_schema(schema), allow_nan=False)
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise RequestError(f"structured_outputs.json is not valid JSON: {error}") from None

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in ("json", "json_object", "regex", "choice", "grammar") if getattr(self, name))

    @property
    def size(self) -> int:
        """The number of characters of what is given."""
        return sum(map(len, self.choice)) if self.choice else len(self.json or self.regex or self.grammar or "")
