"""JSON schemas are followed exactly or refused: numbers, keys, formats, faults of the library."""

from __future__ import annotations

import datetime
import ipaddress
import json
import random
import re
import uuid
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm_infer.base.errors import RequestError
from llm_infer.decoding.formats import PATTERNS
from llm_infer.decoding.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher
from llm_infer.decoding.structured import StructuredOutputsParams

END = 256


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """One whose tokens are bytes."""
    vocabulary = [*(bytes([i]) for i in range(256)), b"<eos>"]
    return GrammarCompiler(vocabulary, [], [END], lambda text: list(text.encode() if isinstance(text, str) else text))


def allowed(matcher: GrammarMatcher, output: list[int]) -> list[int]:
    mask = np.zeros(9, np.int32)
    assert matcher.fill(output, mask) is None
    return [i for i in range(257) if mask[i // 32] >> i % 32 & 1]


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    matcher, output = grammar.matcher(), list[int]()
    for token in [*text.encode(), END]:
        if token not in allowed(matcher, output):
            return False
        output.append(token)
    return True


def draw(grammar: CompiledGrammar, rng: random.Random) -> str:
    """A text of the grammar; letters, digits and signs are drawn equally often."""
    matcher, output = grammar.matcher(), list[int]()
    while True:
        tokens = allowed(matcher, output)
        if END in tokens and (len(tokens) == 1 or rng.random() < 0.5):
            return bytes(output).decode()
        kinds: dict[int, list[int]] = {}
        for token in tokens:
            if token != END:
                kinds.setdefault(0 if chr(token).isalpha() else 1 if chr(token).isdigit() else 2, []).append(token)
        quote = [ord('"')] if ord('"') in tokens and rng.random() < 0.3 else []
        output.append(rng.choice(quote or kinds[rng.choice(sorted(kinds))]))


def of(schema: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ('{"const": 9007199254740993}', "#/const = 9007199254740993"),
        ({"const": -9007199254740993}, "#/const = -9007199254740993"),
        ({"enum": [1, {"a": [18446744073709551615]}]}, "#/enum/1/a/0 = 18446744073709551615"),
        ({"const": 10**400}, "#/const = 1000"),
        ('{"const": 0.1000000000000000055511151231257827}', "#/const = 0.10000000000000000555"),
        ('{"const": 1E400}', r"#/const = 1E\+400"),
        ('{"const": 1e-400}', "#/const = 1E-400"),
        ({"enum": [float("nan")]}, "#/enum/0 = nan"),
        ('{"const": -Infinity}', "#/const = -inf"),
        ({"properties": {"default": {"const": 2**53 + 1}}}, "#/properties/default/const = 9007199254740993"),
        ({"type": "integer", "minimum": 9007199254740993}, "#/minimum = 9007199254740993"),
        ({"type": "integer", "maximum": -9007199254740993}, "#/maximum = -9007199254740993"),
        ('{"type": "number", "exclusiveMaximum": 0.30000000000000004440892}', "#/exclusiveMaximum = 0.3000000000"),
        ({"items": {"exclusiveMinimum": 123456789012345680}}, "#/items/exclusiveMinimum = 123456789012345680"),
        ({"type": "integer", "exclusiveMaximum": -(2**53)}, "#/exclusiveMaximum = -9007199254740992"),
        ({"type": "number", "exclusiveMinimum": 2.0**53}, "#/exclusiveMinimum = 9007199254740992"),
        ({"type": "integer", "maximum": 1e19}, r"#/maximum = 1e\+19"),
        ({"type": "integer", "multipleOf": 2**53 + 1}, "#/multipleOf = 9007199254740993"),
        ({"type": "string", "maxLength": 2**53 + 1}, "#/maxLength = 9007199254740993"),
        ({"const": "\x01"}, "#/const"),
        ({"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}}, "#/minProperties = 2"),
        ({"type": "object", "minProperties": 2, "patternProperties": {"^x": {}}}, "#/minProperties = 2"),
        ({"minProperties": 3, "properties": {"a": {}, "b": {}}, "required": ["a", "b"]}, "#/minProperties = 3"),
        ({"$defs": {"a": {"anyOf": [{"minProperties": 2}]}}}, r"#/\$defs/a/anyOf/0/minProperties = 2"),
        ({"type": "string", "format": "unknown"}, "#/format = unknown"),
        ({"type": "string", "format": "regex"}, "#/format = regex"),
    ],
)
def test_what_would_not_be_followed_exactly_is_refused(schema: Any, where: str) -> None:
    with pytest.raises(RequestError, match=rf"^structured_outputs\.json: {where}"):
        of(schema)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"const": 2**53}, ["9007199254740992"], ["9007199254740993", "9007199254740991"]),
        ({"const": -(2**53)}, ["-9007199254740992"], ["9007199254740992"]),
        ('{"const": 0.1}', ["0.1"], ["0.10"]),
        ('{"const": 1e2}', ["100"], ["10"]),
        ('{"enum": [0.30000000000000004, 123456789012345680]}', ["0.30000000000000004", "123456789012345680"], ["0.3"]),
        ('{"default": 9007199254740993, "examples": [1e400], "const": 5}', ["5"], ["6"]),
        ({"title": float("nan"), "type": "integer", "maximum": 2**53}, ["9007199254740992"], ["9007199254740993"]),
        ({"type": "integer", "exclusiveMinimum": 2**53 - 1}, ["9007199254740992"], ["9007199254740991"]),
        ({"type": "integer", "minimum": -(2**53)}, ["-9007199254740992"], ["-9007199254740993"]),
        ({"minProperties": 1, "type": "object"}, ['{"x": 1}'], ["{}"]),
        (
            {"type": "object", "minProperties": 2, "properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
            ['{"a": 1, "b": 2}', '{"a": 1, "b": 2, "c": 3}'],
            ['{"a": 1}', '{"a": 1, "a": 2}'],
        ),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
            ['{"a": 1}', '{"a": 1, "b": "x"}', '{"\\n\\"": "x"}'],
            [r'{"\u0061": "x"}', r'{"a": 1, "\u0061": "x"}', '{"a": 1, "a": "x"}', '{"a": "x"}'],
        ),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, ['{"b": "x"}'], [r'{"\u0061": "x"}']),
        (
            {
                "type": "object",
                "patternProperties": {"^a": {"type": "integer"}},
                "additionalProperties": {"type": "string"},
            },
            ['{"ab": 1, "b": "x"}'],
            [r'{"\u0061": "x"}', '{"a": "x"}'],
        ),
        (
            {"type": "object", "properties": {"é/": {"type": "null"}}},
            ['{"é/": null}'],
            [r'{"\u00e9/": 1}', r'{"é\/": 1}'],
        ),
        (
            {"type": "string", "format": "date"},
            ['"2024-02-29"', '"2000-02-29"', '"2023-02-28"', '"0001-12-31"'],
            ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"', '"2024-13-01"', '"0000-01-01"', '"2024-1-01"'],
        ),
        (
            {"type": "string", "format": "date-time"},
            ['"2024-02-29T23:59:59Z"', '"2023-01-01T00:00:00.123456+23:59"'],
            [
                '"2023-02-29T00:00:00Z"',
                '"2024-01-01T23:59:60Z"',
                '"2024-01-01T00:00:00+25:00"',
                '"2024-01-01T00:00:00"',
            ],
        ),
        ({"format": "date", "pattern": "^2", "minLength": 2}, ['"2024-02-29"', "7"], ['"1999-01-01"', '"2023-02-29"']),
        ({"type": ["string", "null"], "format": "date"}, ["null", '"2024-02-29"'], ['"2023-02-29"']),
        ({"type": "integer", "format": "int32"}, ["7"], ['"7"']),
        ({"enum": ["2023-02-29", "2023-02-28"], "format": "date"}, ['"2023-02-28"'], ['"2023-02-29"']),
        (
            {"anyOf": [{"$ref": "#/$defs/d"}], "$defs": {"d": {"type": "string", "format": "date"}}},
            ['"2024-02-29"'],
            ['"2023-02-29"'],
        ),
        ({"type": "string", "format": "ipv4"}, ['"255.0.10.1"'], ['"256.0.0.1"', '"01.0.0.1"', '"1.1.1"']),
        ({"type": "string", "format": "ipv6"}, ['"::1"', '"1::"', '"::"'], ['"1:2:3"', '"1::2::3"', '"12345::"']),
        (
            {"type": "string", "format": "hostname"},
            [f'"{"a" * 63}.example"', '"localhost"', '"a-b.c1.d.e.f"'],
            [f'"{"a" * 64}.example"', f'"{"abc." * 63}abc"', '"-a.b"', '"a-.b"', '"a..b"'],
        ),
        ({"type": "string", "format": "email"}, ['"a.b+c@ex-ample.org"'], ['"a"', '"a@b"', '"a..b@c.de"', '"a@-b.de"']),
        (
            {"type": "string", "format": "uri"},
            ['"https://a.org:80/b?c=%20#d"', '"urn:a:b"'],
            ['"a"', '"a:%2"', '"a: b"'],
        ),
        ({"type": "string", "format": "duration"}, ['"P1Y2M3DT4H5M6S"', '"P3W"', '"PT1S"'], ['"P"', '"PT"', '"P1Y2D"']),
    ],
)
def test_schemas_are_followed_exactly(
    compiler: GrammarCompiler, schema: Any, right: list[str], wrong: list[str]
) -> None:
    grammar = compiler.compile(of(schema))
    assert [text for text in right if not accepts(grammar, text)] == []
    assert [text for text in wrong if accepts(grammar, text)] == []


def test_decimals_given_as_objects_keep_their_value(compiler: GrammarCompiler) -> None:
    assert accepts(compiler.compile(of({"const": Decimal("0.25")})), "0.25")
    with pytest.raises(RequestError, match="#/const"):
        of({"const": Decimal("0.1000000000000000055511151231257827")})


@pytest.mark.parametrize("text", ['{"const": 1e99999999999999999999}', '{"const": %s}' % ("9" * 5000)])
def test_numbers_that_python_does_not_read_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"^structured_outputs"):
        of(text)


def check_duration(text: str) -> None:
    assert re.fullmatch(r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)", text)


def check_email(text: str) -> None:
    local, host = text.split("@")
    assert len(local) <= 64 and all(local.split(".")) and len(text) <= 254 and "." in host
    check_host(host)


def check_host(text: str) -> None:
    assert len(text) <= 253
    for label in text.split("."):
        assert 1 <= len(label) <= 63 and label[0] != "-" != label[-1] and label.replace("-", "").isalnum()


CHECKS: dict[str, Callable[[str], object]] = {
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "date-time": datetime.datetime.fromisoformat,
    "duration": check_duration,
    "email": check_email,
    "hostname": check_host,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "uri": lambda text: re.fullmatch(r"[A-Za-z][\w+.-]*:\S+", text, re.ASCII),
}


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_samples_of_a_format_are_valid(compiler: GrammarCompiler, name: str) -> None:
    grammar, rng = compiler.compile(of({"type": "string", "format": name})), random.Random(name)
    for _ in range(60):
        text = json.loads(draw(grammar, rng))
        assert CHECKS[name](text) is not False, text


def test_every_february_29_is_there_in_leap_years_alone() -> None:
    (pattern,) = PATTERNS["date"]
    for year in range(1, 10000):
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        assert bool(re.fullmatch(pattern, f"{year:04}-02-29")) == leap, year
    day = datetime.date(2023, 1, 1)
    while day.year < 2025:
        assert re.fullmatch(pattern, day.isoformat())
        day += datetime.timedelta(1)


class PanicException(BaseException):
    """As a panic in Rust arrives in Python."""


def panic(*args: Any) -> Any:
    raise PanicException("called `Option::unwrap()` on a `None` value")


def test_a_panic_of_the_library_is_a_plain_error(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "thread panicked at parser.rs:1:2:\nindex out of bounds"
    broken = SimpleNamespace(is_error=lambda: True, get_error=lambda: text, consume_tokens=lambda tokens: False)
    late = SimpleNamespace(is_error=lambda: False, get_grammar_warnings=list, unsafe_compute_mask_ptr=panic)
    late.deep_copy = lambda: late

    def fails(params: StructuredOutputsParams) -> None:
        raise ValueError(text)

    for found in (panic, fails, lambda params: broken, lambda params: late):
        monkeypatch.setattr(compiler, "_compile", found)
        with pytest.raises(RequestError) as caught:
            compiler.compile(of({}))
        assert str(caught.value) == (
            "structured_outputs.json could not be compiled (a fault of llguidance): simplify it"
        )
    mask = np.zeros(9, np.int32)
    for matcher in (broken, SimpleNamespace(consume_tokens=panic)):
        why = GrammarMatcher(matcher).fill([1], mask)
        assert why == "structured_outputs could not go on at token 2 (a fault of llguidance): simplify it"
    stop = SimpleNamespace(consume_tokens=lambda tokens: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        GrammarMatcher(stop).fill([1], mask)
