"""Reads the calls between the markers of a format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from llm_infer.text.output_parsing.casting import cast, is_bare, parameter_schema
from llm_infer.text.output_parsing.incoming import Incoming, NotACallError, Reading
from llm_infer.text.output_parsing.literals import json_text, read_string, read_value
from llm_infer.text.output_parsing.rules import ARGUMENT_KEYS, JsonCalls, NamedJson, Pythonic, Tagged, ToolFormat
from llm_infer.text.output_parsing.writer import Writer

MAX_NAME = 256
"""Most characters of a function's or parameter's name."""

_NAME = re.compile(r"[\w.:/-]+", re.ASCII)
_KEYWORD = re.compile(r"\w+")
_NUMBERED = re.compile(r"(.+?):[0-9]+")
_NINE = re.compile("[a-zA-Z0-9]{9}")
_SILENT_KEYS = ("type", "id")


class CallReader:
    """Reads calls of one format.

    Args:
        source: where the text comes from; it records what is read.
        writer: where calls go.
    """

    def __init__(self, source: Incoming, writer: Writer, format: ToolFormat) -> None:
        self._source, self._writer, self._format = source, writer, format
        self._lead, self._bare, self._count = "", False, 0

    def read_section(self, opened: str) -> Reading[None]:
        """Reads calls and the marker that ends them, after `opened`, the marker before them ("" if there was none).

        What is no call becomes text.
        """
        source, format = self._source, self._format
        self._lead, self._bare, self._count = opened, not opened, 0
        source.start_record()
        try:
            yield from self._read_calls()
        except NotACallError:
            kept, rest = self._writer.drop_call(), source.recorded()
            if not (kept and source.ended):
                self._writer.text(rest if kept else self._lead + rest)
            if not self._count:
                return
        # The calls are complete: what is between them and the end marker was white space.
        source.start_record()
        yield from source.skip_space()
        found = yield from source.skip(format.end)
        space = source.recorded()
        if not found:
            self._writer.text(space)

    def _read_calls(self) -> Reading[None]:
        source, rule = self._source, self._format.rule
        yield from source.skip_space()
        if isinstance(rule, Pythonic) and rule.listed:
            yield from self._read_list(self._read_python_call)
        elif isinstance(rule, JsonCalls) or (
            isinstance(rule, NamedJson) and rule.or_json and (yield from source.peek()) in ("{", "[")
        ):
            if (yield from source.peek()) == "[":
                yield from self._read_list(self._read_object)
            else:
                separator = rule.separator if isinstance(rule, JsonCalls) else ""
                yield from self._read_row(self._read_object, "{", separator)
        elif isinstance(rule, NamedJson):
            yield from self._read_row(lambda: self._read_named(rule), rule.before, rule.separator)
        elif isinstance(rule, Tagged):
            yield from self._read_row(lambda: self._read_tagged(rule), rule.before, rule.separator)
        else:
            yield from self._read_row(self._read_python_call, "", "\n")

    def _read_list(self, read: Callable[[], Reading[None]]) -> Reading[None]:
        source = self._source
        yield from source.expect("[")
        while True:
            yield from source.skip_space()
            yield from read()
            yield from source.skip_space()
            if not (yield from source.skip(",")):
                break
        yield from source.expect("]")

    def _read_row(self, read: Callable[[], Reading[None]], opening: str, separator: str) -> Reading[None]:
        """Reads calls one after the other, until no other begins."""
        source, format = self._source, self._format
        mark = opening.split()[0] if opening else ""
        while True:
            yield from read()
            if format.each is not None:
                return
            # What follows may be text; only a separator or the opening of a call is read.
            while True:
                space = yield from source.skip_space()
                if not separator.strip() or not (yield from source.skip(separator.strip())):
                    break
            named = space and _KEYWORD.match((yield from source.peek()))
            if not ((yield from source.comes(mark)) if mark else named):
                self._writer.text(space)
                return

    def _argument(self, text: str) -> None:
        """Hands arguments on: what is recorded from here on is what has not come out."""
        if text:
            self._writer.arguments(text)
            self._source.start_record()

    def _closed(self) -> None:
        """Ends a call: what is read from here on is no part of it."""
        self._writer.close_call()
        self._lead, self._count = "", self._count + 1
        self._source.start_record()

    def _read_object(self) -> Reading[None]:
        source, writer = self._source, self._writer
        yield from source.expect("{")
        name: str | None = None
        held: list[str] | None = None
        closed = False
        while True:
            yield from source.skip_space()
            if name is None and held is None and (yield from source.skip("}")):
                raise NotACallError
            key = yield from read_string(source)
            yield from source.skip_space()
            yield from source.expect(":")
            yield from source.skip_space()
            if key == "name" and name is None:
                name = yield from read_string(source)
                writer.open_call(name)
                if held is not None:
                    self._argument("".join(held))
                    self._closed()
                    closed = True
            elif key in ARGUMENT_KEYS and held is None and not closed:
                if name is None:
                    held = []
                    yield from self._read_arguments(held.append)
                else:
                    yield from self._read_arguments(self._argument)
                    self._closed()
                    closed = True
            elif self._bare and not closed and key not in _SILENT_KEYS:
                raise NotACallError
            else:
                yield from read_value(source, _ignore)
            yield from source.skip_space()
            if not (yield from source.skip(",")):
                break
        yield from source.expect("}")
        if not closed:
            if name is None or self._bare:
                raise NotACallError
            self._closed()

    def _read_named(self, rule: NamedJson) -> Reading[None]:
        source = self._source
        yield from self._expect(rule.before)
        yield from source.skip_space()
        full = yield from self._read_name(_NAME)
        found = _NUMBERED.fullmatch(full) if rule.numbered else None
        name = found[1] if found else full
        id = full if found and self._format.ids == "number" else None
        yield from source.skip_space()
        if rule.id_mark and (yield from source.skip(rule.id_mark)):
            given = yield from self._read_name(_NAME)
            id = given if _NINE.fullmatch(given) else None
            yield from source.skip_space()
        self._writer.open_call(name.removeprefix(rule.prefix), id)
        if not (rule.tight and (yield from source.peek()) == "{"):
            yield from self._expect(rule.middle)
        yield from source.skip_space()
        yield from self._read_arguments(self._argument)
        self._closed()
        if rule.after:
            yield from self._expect(rule.after)

    def _read_tagged(self, rule: Tagged) -> Reading[None]:
        source, writer = self._source, self._writer
        yield from self._expect(rule.before)
        yield from source.skip_space()
        name = yield from self._read_name(_NAME)
        writer.open_call(name)
        yield from self._expect(rule.middle)
        schema = (writer.functions or {}).get(name)
        seen: set[str] = set()
        while True:
            yield from source.skip_space()
            if not (yield from source.skip(rule.key)):
                break
            key, is_json = yield from self._read_key(rule)
            if key in seen:
                raise NotACallError
            known = parameter_schema(schema, key)
            if rule.json_value:  # the format says it
                known = {} if is_json else {"type": "string"}
            text = yield from self._read_parameter(rule, is_bare(known))
            self._argument(f"{', ' if seen else '{'}{json_text(key)}: {cast(text, known)}")
            seen.add(key)
        yield from source.expect(rule.after)
        self._argument("}" if seen else "")
        self._closed()

    def _read_key(self, rule: Tagged) -> Reading[tuple[str, bool]]:
        """Reads up to the value; returns the name of a parameter and whether its text was said to be JSON."""
        source = self._source
        first, *rest = _units(rule.value)
        key: list[str] = []
        if not (yield from source.until((first,), key.append)) or sum(map(len, key)) > MAX_NAME:
            raise NotACallError
        json_rest = _units(rule.json_value)[1:] if rule.json_value else []
        is_json = False
        if rest:
            yield from source.skip_space()
            is_json = bool(json_rest) and (yield from source.skip(json_rest[0]))
            if not is_json:
                yield from self._expect(" ".join(rest))
        return "".join(key).strip(), is_json

    def _read_parameter(self, rule: Tagged, bare: bool) -> Reading[str]:
        """Reads a parameter's value and the marker after it; one that is no bare text may hold this marker in strings."""
        source, end = self._source, rule.end.strip()
        start = source.mark()
        yield from source.skip_space()
        if not bare and (yield from source.peek()) in ("{", "[", '"'):
            value: list[str] = []
            try:
                yield from read_value(source, value.append)
                yield from source.skip_space()
                if (yield from source.skip(end)):
                    return "".join(value)
            except NotACallError:
                pass  # it is text
        if not (yield from source.until((end,), _ignore)):
            raise NotACallError
        return _without(source.since(start).removesuffix(end), rule.padding)

    def _read_python_call(self) -> Reading[None]:
        source, writer = self._source, self._writer
        writer.open_call((yield from self._read_name(_NAME)))
        yield from source.skip_space()
        yield from source.expect("(")
        seen: set[str] = set()
        while True:
            yield from source.skip_space()
            if (yield from source.peek()) == ")":
                break
            key = yield from self._read_name(_KEYWORD)
            yield from source.skip_space()
            yield from source.expect("=")
            yield from source.skip_space()
            if key in seen:
                raise NotACallError
            self._argument(f"{', ' if seen else '{'}{json_text(key)}: ")
            seen.add(key)
            yield from read_value(source, self._argument, python=True)
            yield from source.skip_space()
            if not (yield from source.skip(",")):
                break
        yield from source.expect(")")
        self._argument("}" if seen else "")
        self._closed()

    def _read_arguments(self, emit: Callable[[str], object]) -> Reading[None]:
        """Reads the arguments of a call: an object, an object in a string, or null."""
        source = self._source
        char = yield from source.peek()
        if char == "{":
            yield from read_value(source, emit)
        elif char == '"':
            text = (yield from read_string(source)).strip() or "{}"
            try:
                if not isinstance(json.loads(text, parse_constant=_refuse), dict):
                    raise NotACallError
            except (ValueError, RecursionError):
                raise NotACallError from None
            emit(text)
        else:
            yield from source.expect("null")
            emit("{}")

    def _read_name(self, pattern: re.Pattern[str]) -> Reading[str]:
        parts: list[str] = []
        while (yield from self._source.peek()) and (part := self._source.run(pattern)):
            parts.append(part)
            if sum(map(len, parts)) > MAX_NAME:
                raise NotACallError
        return "".join(parts)

    def _expect(self, literal: str) -> Reading[None]:
        """Reads a literal in which white space may vary."""
        for unit in literal.split():
            yield from self._source.skip_space()
            yield from self._source.expect(unit)


def _units(text: str) -> list[str]:
    """Splits what stands between key and value where white space, or the closing of a tag, may be followed by another."""
    return text.replace("><", "> <").split()


def _without(text: str, padding: str) -> str:
    return text.removeprefix(padding).removesuffix(padding) if padding else text


def _ignore(text: str) -> None:
    """Drops text that nobody needs, or that the record has."""


def _refuse(word: str) -> None:
    raise ValueError(word)
