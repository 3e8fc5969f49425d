"""Tool calls and reasoning over HTTP, by OpenAI's client: forced calls are valid, streams say what whole answers say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llm_infer import LLM
from llm_infer.server.answers import Formats, Reading
from llm_infer.text.output_parsing.chat_output import ChatOutput
from llm_infer.text.output_parsing.formats import tool_format
from llm_infer.text.output_parsing.functions import functions_of
from llm_infer.text.output_parsing.reasoning import reasoning_format
from tests.server.conftest import CHATML, NAME, Served

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}},
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    },
]
ASK: Any = [{"role": "user", "content": "What is the weather?"}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module", params=["hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder", None])
def client(request: pytest.FixtureRequest, tiny_llm: LLM) -> Iterator[OpenAI]:
    served = Served(tiny_llm, tool_call_parser=request.param)
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found
    served.stop()


def joined(chunks: Any) -> tuple[list[dict[str, Any]], str, str | None]:
    """The calls of a stream, its text and why it ended; the rules of deltas are checked."""
    calls: list[dict[str, Any]] = []
    text, reason = "", None
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump())
        for choice in chunk.choices:
            assert reason is None
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.index == len(calls):
                    assert call.id and call.type == "function" and call.function.name and not call.function.arguments
                    calls.append({"name": call.function.name, "arguments": ""})
                else:
                    assert call.index == len(calls) - 1 and call.id is None and call.function.name is None
                    calls[-1]["arguments"] += call.function.arguments
            if choice.finish_reason is not None:
                assert not choice.delta.content and not choice.delta.tool_calls
                reason = choice.finish_reason
    return calls, text, reason


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("seed", [1, 2])
def test_forced_calls_are_valid_whole_and_streamed(client: OpenAI, choice: Any, seed: int) -> None:
    body: Any = dict(
        model=NAME, messages=ASK, tools=TOOLS, tool_choice=choice, max_tokens=90, seed=seed, parallel_tool_calls=False
    )
    found = client.chat.completions.create(**body)
    ChatCompletion.model_validate(found.model_dump())
    answer = found.choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        jsonschema.validate(arguments, PARAMETERS)
    else:
        assert choice == "required" and call.function.name == "now" and arguments == {}
    calls, text, reason = joined(client.chat.completions.create(stream=True, **body))
    assert calls == [{"name": call.function.name, "arguments": call.function.arguments}]
    assert (text, reason) == ("", "tool_calls")


def test_a_call_that_is_cut_says_so(client: OpenAI) -> None:
    body: Any = dict(model=NAME, messages=ASK, tools=TOOLS, tool_choice=NAMED, max_tokens=14, seed=1)
    answer = client.chat.completions.create(**body).choices[0]
    assert answer.finish_reason == "length"
    calls, text, reason = joined(client.chat.completions.create(stream=True, **body))
    assert reason == "length"
    assert text == (answer.message.content or "")
    shown = [
        {"name": one.function.name, "arguments": one.function.arguments} for one in answer.message.tool_calls or ()
    ]
    assert calls == shown


def test_calls_and_their_results_are_taken_as_history(client: OpenAI) -> None:
    for arguments in ('{"city": "Rome", "days": 1}', "", "not JSON"):
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        asks: Any = {"role": "assistant", "content": None, "tool_calls": [call]}
        result: Any = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}
        messages: Any = [*ASK, asks, result]
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=3)
        assert answer.choices[0].finish_reason in ("length", "stop")


def test_what_is_wrong_with_tools_is_refused(client: OpenAI) -> None:
    twice: Any = [TOOLS[0], TOOLS[0]]
    wrong: list[dict[str, Any]] = [
        {"tools": twice},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}], "tool_choice": "required"},
        {"tools": [{"type": "custom", "custom": {"name": "a"}}]},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
    ]
    for body in wrong:
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{"model": NAME, "messages": ASK, "max_tokens": 2, **body})


def test_a_template_without_tools_forces_calls_but_looks_for_none(served: Served) -> None:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        body: Any = dict(model=NAME, messages=ASK, tools=TOOLS, max_tokens=90, seed=1)
        with pytest.raises(openai.BadRequestError, match="knows no tools"):
            client.chat.completions.create(**body)
        assert client.chat.completions.create(tool_choice="none", **body).choices[0].message.tool_calls is None
        assert client.chat.completions.create(tool_choice="required", **body).choices[0].message.tool_calls


def test_reasoning_and_calls_are_told_apart() -> None:
    text = '<think>Hm.</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>'
    functions = functions_of(TOOLS)
    reading = Reading(tool_format("hermes"), reasoning_format("qwen3"), functions=functions, endings=("<|im_end|>",))
    answer, scanner = ChatOutput(), reading.scanner()
    answer.push(scanner.push(reading.shown(text, "stop")) + scanner.finish())
    found = answer.message()
    assert found["reasoning"] == found["reasoning_content"] == "Hm."
    assert found["content"] is None and found["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert answer.finish_reason("stop") == "tool_calls"
    hidden = replace(reading, hides_reasoning=True)
    answer, scanner = ChatOutput(), hidden.scanner()
    answer.push(hidden.wanted(scanner.push("<think>Hm.</think>\n\nYes.") + scanner.finish()))
    assert answer.message() == {"role": "assistant", "content": "Yes.", "refusal": None}


def test_a_stop_string_does_not_break_a_forced_call(client: OpenAI) -> None:
    body: Any = dict(model=NAME, messages=ASK, tools=TOOLS, tool_choice=NAMED, max_tokens=90, seed=1)
    answer = client.chat.completions.create(stop=["}", '"', ")", "e"], **body).choices[0]
    assert answer.finish_reason == "tool_calls"
    jsonschema.validate(json.loads(answer.message.tool_calls[0].function.arguments), PARAMETERS)


def test_formats_come_from_the_template_or_by_name() -> None:
    assert Formats(CHATML).tools is None and Formats(CHATML).reasoning is None
    assert Formats(CHATML, "hermes", "deepseek_r1").tools is tool_format("hermes")
    template = "{% if tools %}<tool_call>{{ arguments }}</tool_call>{% endif %}<think></think>"
    assert Formats(template).tools is tool_format("hermes") and Formats(template).reasoning is reasoning_format("qwen3")
    assert Formats(template, "none", "none").tools is None and Formats(template, "none", "none").reasoning is None


def test_a_form_of_the_answer_is_no_reasoning(tiny_llm: LLM) -> None:
    served = Served(tiny_llm, reasoning_parser="deepseek_r1")
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        form: Any = {"structured_outputs": {"choice": ["New York", "Boston"]}}
        message = client.chat.completions.create(model=NAME, messages=ASK, extra_body=form).choices[0].message
        assert message.content in ("New York", "Boston")
        free = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=5, seed=1)
        assert free.choices[0].message.content == "" and free.choices[0].message.reasoning_content
        assert free.usage.completion_tokens_details.reasoning_tokens > 0
        texts = ["", ""]
        for chunk in client.chat.completions.create(model=NAME, messages=ASK, max_tokens=5, seed=1, stream=True):
            texts[0] += chunk.choices[0].delta.content or ""
            texts[1] += getattr(chunk.choices[0].delta, "reasoning", None) or ""
        assert texts == ["", free.choices[0].message.reasoning_content]
    served.stop()
