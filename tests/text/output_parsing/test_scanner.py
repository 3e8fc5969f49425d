"""Outputs of each family are taken apart, however they arrive; what is no call stays text."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_infer.base.errors import RequestError
from llm_infer.text.output_parsing.formats import FORMATS, need_special_tokens, tool_format
from llm_infer.text.output_parsing.pieces import CallArguments, CallStart, Text
from llm_infer.text.output_parsing.reasoning import reasoning_format, starts_in_reasoning
from llm_infer.text.output_parsing.scanner import OutputScanner
from tests.text.output_parsing.outputs import FUNCTIONS, OUTPUTS, Output, put_together, scan

WORDS = sorted(
    {marker for each in FORMATS for marker in each.markers}
    | {
        "<think>",
        "</think>",
        "get_weather",
        "now",
        "functions.now:0",
        '{"name": "now"',
        ', "arguments": ',
        "{}",
        "}",
        "[",
        "]",
    }
    | {
        "now(",
        "city=",
        "'a'",
        ")",
        '"a',
        "\\u00",
        "\n",
        " ",
        "Text",
        "é",
        '{"city": "x"}',
        "<parameter=city>",
        "1e",
        "; ",
        ",",
    }
)


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted(place for place in places if place <= len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_of_every_family_are_read(output: Output) -> None:
    found = output.scan([output.written])
    assert found.values == list(output.calls)
    assert (found.text, found.reasoning) == (output.text, output.reasoning)
    assert len(found.calls) == len(output.calls)


def test_every_format_has_outputs() -> None:
    assert {output.format for output in OUTPUTS.values()} == {each.name for each in FORMATS}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_it_does_not_matter_how_an_output_is_cut_into_bits(output: Output) -> None:
    written = output.written
    whole = output.scan([written])
    assert output.scan(list(written)) == whole
    for place in range(1, len(written)):
        assert output.scan([written[:place], written[place:]]) == whole, written[:place]


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_that_breaks_off_is_read_alike_in_all_bits_and_keeps_its_text(output: Output) -> None:
    for end in range(len(output.written)):
        written = output.written[:end]
        whole = output.scan([written])
        assert output.scan(list(written)) == whole, written
        assert whole.values == list(output.calls)[: len(whole.values)] or output.format == "glm45", written
        incomplete = [call for call in whole.calls if not call[3]]
        assert incomplete in ([], whole.calls[-1:])
        if not whole.calls and not output.parser and output.format != "openai":
            assert whole.text == written, "nothing is lost"


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.sampled_from(WORDS), max_size=14),
    places=st.lists(st.integers(0, 200)),
    format=st.sampled_from([each.name for each in FORMATS]),
    reasoning=st.sampled_from([None, "qwen3"]),
)
def test_any_text_is_read_alike_in_all_bits(
    parts: list[str], places: list[int], format: str, reasoning: str | None
) -> None:
    written = "".join(parts)
    whole = scan(written, format, reasoning)
    assert scan(cut(written, places), format, reasoning) == whole
    assert scan(list(written), format, reasoning) == whole
    for _, name, arguments, complete in whole.calls:
        assert name in FUNCTIONS
        if complete:
            assert isinstance(json.loads(arguments), dict)


@pytest.mark.sweep
@settings(max_examples=20_000, deadline=None)
@given(
    parts=st.lists(st.sampled_from(WORDS), max_size=20),
    places=st.lists(st.integers(0, 300)),
    format=st.sampled_from([each.name for each in FORMATS]),
    reasoning=st.sampled_from([None, "qwen3"]),
)
def test_very_many_texts_are_read_alike_in_all_bits(
    parts: list[str], places: list[int], format: str, reasoning: str | None
) -> None:
    written = "".join(parts)
    assert scan(cut(written, places), format, reasoning) == scan(written, format, reasoning)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(
    values=st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), _VALUES, max_size=3),
    indent=st.none() | st.just(1),
)
def test_arguments_come_out_as_they_were_written(values: dict[str, object], indent: int | None) -> None:
    written = json.dumps(values, indent=indent)
    found = scan(list(f'<tool_call>{{"name": "now", "arguments": {written}}}</tool_call>'), "hermes")
    assert found.calls == [("id0", "now", written, True)]
    python = ", ".join(f"{name}={value!r}" for name, value in values.items())
    found = scan(list(f"[now({python})]"), "pythonic")
    assert found.values == [("now", values)]


@pytest.mark.parametrize(
    "literal",
    [
        *(
            r"'it\'s'",
            r'"\x41\101\u00e9\U0001F600\n\d\ "',
            "'''a\n'b''c'''",
            '"""a"b"""',
            "''",
            '""',
            "''''''",
            r"'a\
b'",
        ),
        *(
            "1",
            "-1.5e3",
            "+2",
            "0",
            "00",
            ".5",
            "1.",
            "1e5",
            "01.5",
            "(1, 2)",
            "(1,)",
            "()",
            "[1, 2,]",
            "{'a': (True, None),}",
        ),
    ],
)
def test_python_literals_have_the_values_that_python_gives_them(literal: str) -> None:
    expected = json.loads(json.dumps(ast.literal_eval(literal.replace(r"\d\ ", r"\\d\\ "))))
    assert scan(list(f"[now(a={literal})]"), "pythonic").values == [("now", {"a": expected})]


@pytest.mark.parametrize(
    "literal",
    [
        *("f()", "__import__('os')", "a", "{1}", "b'x'", "1_000", "012", "1 + 1", "'a' 'b'", r"'\N{DASH}'"),
        *("'a\nb'", "[1 2]"),
    ],
)
def test_what_is_no_literal_of_python_is_no_argument(literal: str) -> None:
    assert scan(f"[now(a={literal})]", "pythonic").values == []


@pytest.mark.parametrize(
    ("written", "format"),
    [
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "hermes"),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', "hermes"),
        ('<tool_call>{"arguments": {}}</tool_call>', "hermes"),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>', "hermes"),
        ('<tool_call>{"name": "now", "arguments": "[1]"}</tool_call>', "hermes"),
        ('<tool_call>{"name": "now", "arguments": "{\\"a\\": NaN}"}</tool_call>', "hermes"),
        ("<tool_call>now</tool_call>", "hermes"),
        ("<tool_call>\n\n<", "hermes"),
        ("Write <tool_call> and </tool_call>.", "hermes"),
        ("<tool_call><function=now><parameter=city>a</function></tool_call>", "qwen3_coder"),
        ("<tool_call>now and then</tool_call>", "glm45"),
        ("[now(1)]", "pythonic"),
        ("[TOOL_CALLS]rm[ARGS]{}", "mistral"),
        ('{"name": "now"}', "llama3_json"),
        ("[]", "json"),
    ],
)
def test_what_is_no_call_stays_text(written: str, format: str) -> None:
    found = scan(list(written), format)
    assert (found.text, found.calls) == (written, [])


def test_a_message_to_an_unknown_function_of_harmony_is_text() -> None:
    header = "<|channel|>commentary to=functions.{}<|constrain|>json<|message|>"
    found = scan(list(header.format("rm") + '{"a": 1}<|call|>' + header.format("now") + "[1]"), "openai")
    assert (found.text, found.calls) == ('{"a": 1}[1]', [])


def test_a_call_after_one_that_is_none_is_found() -> None:
    found = scan('<tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>', "hermes")
    assert (found.text, found.values) == ("<tool_call>", [("now", {})])


def test_arguments_that_go_wrong_end_the_call_and_the_rest_is_text() -> None:
    found = scan('<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>', "hermes")
    assert found.calls == [("id0", "now", '{"a": ', False)]
    assert found.text == "oops}}</tool_call>"


def test_nesting_has_an_end() -> None:
    deep = "[" * 100_000
    for bits in ([f'<tool_call>{{"name": "now", "arguments": {{"a": {deep}'], list(f"[now(a={deep[:500]}")):
        found = scan(bits, "hermes" if len(bits) == 1 else "pythonic")
        assert [call[3] for call in found.calls] == [False]


def test_any_function_may_be_called_where_none_is_known() -> None:
    assert scan('<tool_call>{"name": "x", "arguments": {}}', "hermes", functions=None).values == [("x", {})]


def test_arguments_come_out_while_they_are_written() -> None:
    scanner = OutputScanner(tool_format("hermes"), functions=FUNCTIONS)
    assert scanner.push('Hi <tool_call>{"name": "get_weather", "arg') == [Text("Hi")]
    start, arguments = scanner.push('uments": {"city": "Par')
    assert isinstance(start, CallStart) and start.name == "get_weather"
    assert arguments == CallArguments(0, '{"city": "Par')
    assert scanner.push("is") == [CallArguments(0, "is")]


def test_text_does_not_wait_without_need() -> None:
    scanner = OutputScanner(tool_format("hermes"))
    assert scanner.push("a < b") == [Text("a < b")]
    assert scanner.push(" <tool") == []
    assert scanner.push("box>") == [Text(" <toolbox>")]
    assert OutputScanner().push(" <tool_call> ") == [Text(" <tool_call> ")]


MEGABYTE = 1 << 20
LONG = {
    "text": "a" * MEGABYTE,
    "markers": "<tool_call>" * (MEGABYTE // 11),
    "beginnings of markers": "<" * MEGABYTE,
    "space": " " * MEGABYTE,
    "space in a call": "<tool_call>" + " " * MEGABYTE,
    "a string": '<tool_call>{"name": "now", "arguments": {"a": "' + "b" * MEGABYTE,
    "a string that waits for a name": '<tool_call>{"arguments": {"a": "' + "b" * MEGABYTE,
    "lists": '<tool_call>{"name": "now", "arguments": {"a": [' + "[1], " * (MEGABYTE // 25),
    "reasoning": "<think>" + "a </thin " * (MEGABYTE // 9),
}


@pytest.mark.parametrize("written", LONG.values(), ids=LONG.keys())
def test_time_is_linear_in_the_length_of_an_output(written: str) -> None:
    """A quadratic one would take minutes."""
    start = time.process_time()
    scan(written, "hermes", "qwen3")
    scan([written[i : i + 512] for i in range(0, len(written), 512)], "hermes", "qwen3")
    assert time.process_time() - start < 20


@pytest.mark.sweep
@pytest.mark.parametrize("written", LONG.values(), ids=LONG.keys())
def test_time_is_linear_also_in_single_characters(written: str) -> None:
    start = time.process_time()
    scan(list(written), "hermes", "qwen3")
    assert time.process_time() - start < 60


def test_the_scanner_knows_while_reasoning_goes_on() -> None:
    scanner = OutputScanner(None, reasoning_format("qwen3"))
    told = []
    for bit in ("<thi", "nk>a", "b</thi", "nk>", "c"):
        scanner.push(bit)
        told.append(scanner.thinking)
    assert told == [False, True, True, False, False]
    assert OutputScanner(None, reasoning_format("qwen3"), in_reasoning=True).thinking
    harmony = OutputScanner(None, reasoning_format("openai"))
    harmony.push("<|channel|>analysis<|message|>a")
    assert harmony.thinking
    harmony.push("<|end|>")
    assert not harmony.thinking


@pytest.mark.parametrize("bits", [1, 7, 1000])
def test_an_output_may_have_one_call_only(bits: int) -> None:
    scanner = OutputScanner(tool_format("hermes"), parallel=False, functions=FUNCTIONS)
    written = "Hi" + OUTPUTS["hermes, nothing around"].written + "Bye"
    pieces = [piece for i in range(0, len(written), bits) for piece in scanner.push(written[i : i + bits])]
    assert scanner.ended
    found = put_together([*pieces, *scanner.finish()])
    assert (found.text, found.values) == ("Hi", [OUTPUTS["hermes"].calls[0]])


def test_ids_have_the_form_that_the_family_uses() -> None:
    assert tool_format("hermes").new_id() != tool_format("hermes").new_id()
    assert tool_format("hermes").new_id().startswith("call_") and len(tool_format("hermes").new_id()) == 29
    assert len(tool_format("mistral").new_id()) == 9 and tool_format("mistral").new_id().isalnum()
    call = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    found = scan(f"<|tool_calls_section_begin|>{call}{call}<|tool_calls_section_end|>", "kimi_k2")
    assert [id for id, *_ in found.calls] == ["functions.now:0", "functions.now:1"]


def test_ids_that_a_model_writes_are_kept_if_they_are_well_formed_and_new() -> None:
    written = "[TOOL_CALLS]now[CALL_ID]{}[ARGS]{{}}"
    found = scan("".join(map(written.format, ("abcDEF123", "abcDEF123", "no", "xyzDEF123"))), "mistral")
    assert [id for id, *_ in found.calls] == ["abcDEF123", "id0", "id1", "xyzDEF123"]


def test_special_tokens_are_needed_where_markers_are_such() -> None:
    assert need_special_tokens(tool_format("mistral").markers, ["[TOOL_CALLS]", "</s>"])
    assert not need_special_tokens(tool_format("hermes").markers, ["<|im_end|>"])


def test_the_end_of_the_prompt_says_whether_an_output_begins_with_reasoning() -> None:
    qwen3, r1 = reasoning_format("qwen3"), reasoning_format("deepseek_r1")
    assert starts_in_reasoning("<|im_start|>assistant\n<think>\n", qwen3)
    assert not starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", qwen3)
    assert not starts_in_reasoning("<|im_start|>assistant\n", qwen3)
    assert starts_in_reasoning("<｜Assistant｜>", r1) and not starts_in_reasoning("<｜Assistant｜></think>", r1)
    assert not starts_in_reasoning("<think>", None) and not starts_in_reasoning("<think>", reasoning_format("openai"))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"tool_call_parser='x': expected one of .*hermes"):
        tool_format("x")
    with pytest.raises(RequestError, match=r"reasoning_parser='x': expected one of .*qwen3"):
        reasoning_format("x")
    names = [name for each in FORMATS for name in (each.name, *each.aliases)]
    assert len(set(names)) == len(names)
