"""A message and its deltas say the same, in the form that clients of OpenAI's interface read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from llm_infer.text.output_parsing.chat_output import ChatOutput
from llm_infer.text.output_parsing.formats import tool_format
from llm_infer.text.output_parsing.pieces import CallArguments, CallEnd, CallStart, Piece, ReasoningText, Text
from llm_infer.text.output_parsing.scanner import OutputScanner
from tests.text.output_parsing.outputs import FUNCTIONS, OUTPUTS, Output

CALL = [CallStart(0, "call_1", "now"), CallArguments(0, "{}"), CallEnd(0, True)]
CUT = [CallStart(0, "call_1", "now"), CallArguments(0, "{"), CallEnd(0, False)]


def joined(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins deltas as the SDK does: texts are put together, lists go by index."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    for delta in deltas:
        for name in ("content", "reasoning", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert call["id"] and call["type"] == "function" and call["function"]["arguments"] == ""
                calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                assert call["index"] == len(calls) - 1 and set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    if "tool_calls" in message and not message["content"]:
        message["content"] = None
    return message


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_deltas_put_together_are_the_message(output: Output) -> None:
    scanner = OutputScanner(tool_format(output.format), functions=FUNCTIONS)
    chat = ChatOutput()
    deltas = [delta for char in output.written for delta in chat.push(scanner.push(char))]
    deltas += chat.push(scanner.finish())
    assert joined(deltas) == chat.message()
    calls = chat.message().get("tool_calls", [])
    assert len(calls) == len(output.calls)
    assert chat.finish_reason("stop") == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize(
    ("pieces", "reason", "expected"),
    [
        ([Text("a")], "stop", "stop"),
        ([Text("a")], "length", "length"),
        (CALL, "stop", "tool_calls"),
        (CALL, "length", "tool_calls"),
        ([*CALL, Text("a")], "stop", "tool_calls"),
        ([*CALL, Text("a")], "length", "length"),
        (CUT, "length", "length"),
        (CUT, "stop", "length"),
        ([*CUT, CallStart(1, "call_2", "now"), CallArguments(1, "{}"), CallEnd(1, True)], "stop", "length"),
        (CALL, "abort", "abort"),
        ([], "stop", "stop"),
    ],
)
def test_a_choice_ends_with_tool_calls_only_where_all_are_complete(
    pieces: list[Piece], reason: str, expected: str
) -> None:
    chat = ChatOutput()
    chat.push(pieces)
    assert chat.finish_reason(reason) == expected


def test_the_message_has_the_keys_that_clients_look_for() -> None:
    chat = ChatOutput()
    assert chat.message() == {"role": "assistant", "content": "", "refusal": None}
    assert chat.push([ReasoningText("r")]) == [{"reasoning": "r", "reasoning_content": "r"}]
    chat.push(CALL)
    assert chat.message() == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning": "r",
        "reasoning_content": "r",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    }
