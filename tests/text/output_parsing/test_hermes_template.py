"""The shipped template shows functions, calls and results in the form that the scanner reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_infer.text.chat_template import apply_chat_template
from llm_infer.text.output_parsing.formats import format_of_template
from tests.text.output_parsing.outputs import scan

TEMPLATE = (Path(__file__).parents[3] / "configs" / "chat_templates" / "hermes_tools.jinja").read_text()
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "é", "parameters": {"type": "object"}}}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    return apply_chat_template(TEMPLATE, messages, tools=tools)


def test_the_template_shows_its_format() -> None:
    found = format_of_template(TEMPLATE)
    assert found is not None and found.name == "hermes"


def test_without_tools_it_is_plain_chatml() -> None:
    assert render([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_functions_stand_in_the_system_message() -> None:
    text = render([{"role": "user", "content": "Hi"}], [TOOL])
    assert text.startswith("<|im_start|>system\nThese functions") and text.count("<|im_start|>system") == 1
    (shown,) = [line for line in text.splitlines() if line.startswith("{") and "NAME" not in line]
    assert json.loads(shown) == TOOL["function"]
    both = render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], [TOOL])
    assert both.startswith("<|im_start|>system\nBe brief.\n\nThese functions") and both.count("<|im_start|>system") == 1


def test_calls_are_shown_as_the_scanner_reads_them_and_results_together() -> None:
    arguments = {"city": "Paris", "days": 2}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call(json.dumps(arguments)), call(arguments)]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
        {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
        {"role": "assistant", "content": "Both.", "tool_calls": [call("")]},
        {"role": "tool", "tool_call_id": "call_3", "content": "snow"},
    ]
    text = render(messages, [TOOL])
    turns = text.split("<|im_start|>")
    assert turns[4] == (
        "user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
    )
    assert turns[6] == "user\n<tool_response>\nsnow\n</tool_response><|im_end|>\n"
    first, second = (turns[i].removeprefix("assistant\n").removesuffix("<|im_end|>\n") for i in (3, 5))
    assert scan(first, "hermes").values == [("get_weather", arguments)] * 2 and not scan(first, "hermes").text
    assert scan(second, "hermes").values == [("get_weather", {})] and scan(second, "hermes").text == "Both."
