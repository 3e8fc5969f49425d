"""Reads a JSON or Python literal as it arrives and hands it on as JSON text; nothing is evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from llm_infer.text.output_parsing.incoming import Incoming, NotACallError, Reading

MAX_DEPTH = 128
"""Deepest nesting of lists and objects in the arguments of a call."""

_PLAIN = {quote: re.compile(rf"[^{quote}\\\x00-\x1f\x7f]+") for quote in ('"', "'")}
_NUMBER_CHARS = re.compile(r"[-+0-9.eE_]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_PYTHON_NUMBER = re.compile(r"([-+]?)([0-9]+)?(?:(\.)([0-9]*))?(?:[eE]([-+]?[0-9]+))?")
_LETTERS = re.compile(r"[A-Za-z]+")
_WORDS = {"true": "true", "false": "false", "null": "null"}
_PYTHON_WORDS = {**_WORDS, "True": "true", "False": "false", "None": "null"}
_HEX = re.compile(r"[0-9a-fA-F]+")
_OCTAL = re.compile(r"[0-7]")
_PYTHON_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_CLOSERS = {"[": "]", "{": "}", "(": ")"}

Emit = Callable[[str], object]


def read_value(source: Incoming, emit: Emit, *, python: bool = False) -> Reading[None]:
    """Reads one value and gives its JSON text, part by part, to `emit`.

    JSON is handed on as it is written, except that bare control characters in strings become escapes. In Python, tuples become
    lists; sets, bytes, numbers with `_` and names other than True, False and None (or JSON's) are refused.

    Raises:
        NotACallError: it is not a literal, or nested deeper than `MAX_DEPTH`.
    """
    closers: list[str] = []
    while True:
        emit((yield from source.skip_space()))
        char = yield from source.peek()
        if char in _CLOSERS and (python or char != "("):
            closers.append(_CLOSERS[source.take(1)])
            if len(closers) > MAX_DEPTH:
                raise NotACallError
            emit("[" if char == "(" else char)
            emit((yield from source.skip_space()))
            if (yield from source.peek()) != closers[-1]:
                yield from _read_key(source, emit, closers, python)
                continue
        else:
            yield from _read_scalar(source, emit, python)
        while closers:  # what follows a value
            emit((yield from source.skip_space()))
            char = yield from source.peek()
            if char == closers[-1]:
                emit("]" if source.take(1) == ")" else char)
                closers.pop()
                continue
            if char != ",":
                raise NotACallError
            source.take(1)
            space = yield from source.skip_space()
            if python and (yield from source.peek()) == closers[-1]:
                continue  # the comma of `(1,)`
            emit("," + space)
            yield from _read_key(source, emit, closers, python)
            break
        else:
            return


def read_string(source: Incoming, *, python: bool = False) -> Reading[str]:
    """Reads a string in quotes and returns its value.

    Raises:
        NotACallError: it is not a string.
    """
    parts: list[str] = []
    yield from _read_string(source, parts.append, python)
    return json.loads("".join(parts))


def json_text(value: object) -> str:
    """Returns the JSON text of a value, in the form that grammars write."""
    return json.dumps(value, ensure_ascii=False)


def _read_key(source: Incoming, emit: Emit, closers: list[str], python: bool) -> Reading[None]:
    """Reads, within an object, the key of the next value and the colon."""
    if closers[-1] != "}":
        return
    yield from _read_string(source, emit, python)
    emit((yield from source.skip_space()))
    yield from source.expect(":")
    emit(":")


def _read_scalar(source: Incoming, emit: Emit, python: bool) -> Reading[None]:
    char = yield from source.peek()
    if char == '"' or (python and char == "'"):
        yield from _read_string(source, emit, python)
    elif char and char in "-+.0123456789":
        text = yield from _collect(source, _NUMBER_CHARS)
        emit(_python_number(text) if python else text if _NUMBER.fullmatch(text) else _refuse())
    else:
        words = _PYTHON_WORDS if python else _WORDS
        emit(words.get((yield from _collect(source, _LETTERS))) or _refuse())


def _collect(source: Incoming, pattern: re.Pattern[str]) -> Reading[str]:
    """Reads all characters of a class; the first that is none of them is there then, or the text has ended."""
    parts: list[str] = []
    while (yield from source.peek()) and (part := source.run(pattern)):
        parts.append(part)
    return "".join(parts)


def _python_number(text: str) -> str:
    found = _PYTHON_NUMBER.fullmatch(text)
    if (
        not found
        or not (found[2] or found[4])
        or (found[2] and not found[3] and not found[5] and _leads_zero(found[2]))
    ):
        raise NotACallError
    sign, whole, point, fraction, exponent = found.groups()
    number = (whole or "0").lstrip("0") or "0"
    tail = f".{fraction or '0'}" if point else ""
    return ("-" if sign == "-" else "") + number + tail + (f"e{exponent}" if exponent else "")


def _leads_zero(digits: str) -> bool:
    """Checks for an integer such as 012, which Python refuses."""
    return digits[0] == "0" and digits.strip("0") != ""


def _read_string(source: Incoming, emit: Emit, python: bool) -> Reading[None]:
    quote = yield from source.peek()
    if quote != '"' and not (python and quote == "'"):
        raise NotACallError
    source.take(1)
    end = quote
    if python and (yield from source.skip(quote)):
        if not (yield from source.skip(quote)):
            emit('""')
            return
        end = quote * 3
    emit('"')
    while not (yield from source.skip(end)):
        char = yield from source.peek()
        if not char:
            raise NotACallError
        if part := source.run(_PLAIN[quote]):
            emit(part.replace('"', '\\"'))
        elif char == "\\":
            source.take(1)
            emit((yield from (_python_escape(source) if python else _escape(source))))
        elif python and len(end) == 1 and char == "\n":
            raise NotACallError
        else:
            emit(json_text(source.take(1))[1:-1])
    emit('"')


def _escape(source: Incoming) -> Reading[str]:
    char = yield from source.peek()
    if char and char in '"\\/bfnrt':
        return "\\" + source.take(1)
    digits = yield from source.peek(5)
    if len(digits) < 5 or digits[0] != "u" or not _HEX.fullmatch(digits, 1):
        raise NotACallError
    return "\\" + source.take(5)


def _python_escape(source: Incoming) -> Reading[str]:
    char = yield from source.peek()
    width = {"x": 2, "u": 4, "U": 8}.get(char)
    if width:
        digits = (yield from source.peek(1 + width))[1:]
        if len(digits) < width or not _HEX.fullmatch(digits) or int(digits, 16) > 0x10FFFF:
            raise NotACallError
        source.take(1 + width)
        return json.dumps(chr(int(digits, 16)))[1:-1]
    if char and char in "01234567":
        octal = source.take(1)
        while len(octal) < 3 and (yield from source.peek()) and (digit := source.run(_OCTAL)):
            octal += digit
        return json.dumps(chr(int(octal, 8)))[1:-1]
    if not char or char == "N":
        raise NotACallError
    source.take(1)
    if char in "\\'\"":
        return json.dumps(char)[1:-1]
    return json_text(_PYTHON_ESCAPES[char])[1:-1] if char in _PYTHON_ESCAPES else "\\\\" + json_text(char)[1:-1]


def _refuse() -> str:
    raise NotACallError
