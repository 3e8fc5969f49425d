"""Outputs of each family of models with the calls in them, and how tests read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from llm_infer.text.output_parsing.formats import tool_format
from llm_infer.text.output_parsing.pieces import CallArguments, CallEnd, CallStart, Piece, ReasoningText, Text
from llm_infer.text.output_parsing.reasoning import reasoning_format
from llm_infer.text.output_parsing.scanner import OutputScanner

FUNCTIONS: dict[str, dict[str, Any] | None] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"enum": ["C", "F"]},
            "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
        },
        "required": ["city"],
    },
    "now": None,
}

PARIS = {"city": "Paris", "days": 2}
Call = tuple[str, dict[str, Any]]


@dataclass
class Read:
    """What a scanner found: texts joined, calls as (id, name, text of the arguments, whether complete)."""

    reasoning: str
    text: str
    calls: list[tuple[str, str, str, bool]]

    @property
    def values(self) -> list[Call]:
        return [(name, json.loads(arguments)) for _, name, arguments, complete in self.calls if complete]


def put_together(pieces: Iterable[Piece]) -> Read:
    """Joins pieces and checks that calls do not mix."""
    found = Read("", "", [])
    open_call: int | None = None
    for piece in pieces:
        match piece:
            case ReasoningText(text):
                assert open_call is None and text
                found.reasoning += text
            case Text(text):
                assert open_call is None and text
                found.text += text
            case CallStart(index, id, name):
                assert open_call is None and index == len(found.calls)
                open_call = index
                found.calls.append((id, name, "", False))
            case CallArguments(index, text):
                assert index == open_call and text
                id, name, before, _ = found.calls[-1]
                found.calls[-1] = (id, name, before + text, False)
            case CallEnd(index, complete):
                assert index == open_call
                open_call = None
                found.calls[-1] = (*found.calls[-1][:3], complete)
                assert found.calls[-1][2]
    assert open_call is None
    ids = [id for id, *_ in found.calls]
    assert len(set(ids)) == len(ids)
    return found


def scan(
    bits: str | Sequence[str],
    format: str | None,
    reasoning: str | None = None,
    *,
    in_reasoning: bool = False,
    functions: dict[str, Any] | None = FUNCTIONS,
) -> Read:
    """Scans an output that arrives in these bits."""
    numbers = count()
    scanner = OutputScanner(
        tool_format(format) if format else None,
        reasoning_format(reasoning) if reasoning else None,
        in_reasoning=in_reasoning,
        functions=functions,
        new_id=lambda: f"id{next(numbers)}",
    )
    pieces = [piece for bit in ([bits] if isinstance(bits, str) else bits) for piece in scanner.push(bit)]
    return put_together([*pieces, *scanner.finish()])


@dataclass(frozen=True)
class Output:
    """An output of a model and what is in it."""

    format: str
    written: str
    calls: tuple[Call, ...] = ()
    text: str = ""
    reasoning: str = ""
    parser: str | None = None
    in_reasoning: bool = False

    def scan(self, bits: Sequence[str]) -> Read:
        return scan(bits, self.format, self.parser, in_reasoning=self.in_reasoning)


W, N = ("get_weather", PARIS), ("now", {})
_ARGS = '{"city": "Paris", "days": 2}'
_OBJECT = f'{{"name": "get_weather", "arguments": {_ARGS}}}'
_NOW = '{"name": "now", "arguments": {}}'
_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_ONE, _SEP, _OVER = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

OUTPUTS: dict[str, Output] = {
    "hermes": Output("hermes", f"<tool_call>\n{_OBJECT}\n</tool_call>", (W,)),
    "hermes, two with text around": Output(
        "hermes",
        f"I look.\n\n<tool_call>\n{_OBJECT}\n</tool_call>\n<tool_call>\n{_NOW}\n</tool_call>\nDone.\n",
        (W, N),
        "I look.\n\n\n\nDone.\n",
    ),
    "hermes, arguments first": Output(
        "hermes", f'<tool_call>\n{{"arguments": {_ARGS}, "name": "get_weather"}}\n</tool_call>', (W,)
    ),
    "hermes, arguments as text": Output(
        "hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}"}', (W,)
    ),
    "hermes, nothing around": Output(
        "hermes", f"<tool_call>{_OBJECT}</tool_call><tool_call>{_NOW}</tool_call>", (W, N)
    ),
    "hermes, no arguments": Output("hermes", '<tool_call>{"name": "now"}</tool_call>', (N,)),
    "hermes, null arguments": Output("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', (N,)),
    "hermes, other keys": Output(
        "hermes", f'<tool_call>{{"id": [1], "type": "function", {_OBJECT[1:-1]}, "x": {{"name": 1}}}}</tool_call>', (W,)
    ),
    "hermes, a brace too few": Output("hermes", f"<tool_call>\n{_OBJECT[:-1]}\n</tool_call>", (W,)),
    "hermes, line breaks in strings": Output(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "a\n\tb"}}</tool_call>',
        (("get_weather", {"city": "a\n\tb"}),),
    ),
    "hermes, markers in strings": Output(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call>{[\\"\\\\"}}</tool_call>',
        (("get_weather", {"city": '</tool_call>{["\\'}),),
    ),
    "qwen3, thinking": Output(
        "hermes",
        f"<think>\nWeather of <tool_call>?\n</think>\n\n<tool_call>\n{_OBJECT}\n</tool_call>",
        (W,),
        reasoning="Weather of <tool_call>?",
        parser="qwen3",
    ),
    "deepseek r1, thinking opened by the prompt": Output(
        "hermes", "Let me\nsee.</think>\n\nHello.\n", (), "Hello.\n", "Let me\nsee.", "deepseek_r1", True
    ),
    "no reasoning": Output("hermes", " Hello <think>.", (), " Hello <think>.", parser="qwen3"),
    "smollm2": Output("smollm2", f"<tool_call>[{_OBJECT}, {_NOW}]</tool_call>", (W, N)),
    "qwen3_coder": Output(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        (W, N),
    ),
    "qwen3_coder, values": Output(
        "qwen3_coder",
        '<tool_call><function=get_weather><parameter=city>\n\n1 "<b>"\n\n</parameter><parameter=where>{"lat": 1.5}'
        "</parameter><parameter=days>two</parameter><parameter=units>C</parameter><parameter=new>[1]</parameter>"
        "</function></tool_call>",
        (
            (
                "get_weather",
                {"city": '\n1 "<b>"\n', "where": {"lat": 1.5}, "days": "two", "units": "C", "new": [1]},
            ),
        ),
    ),
    "seed_oss": Output(
        "seed_oss",
        "<seed:think>hm</seed:think><seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
        "<parameter=days>2</parameter>\n</function>\n</seed:tool_call>",
        (W,),
        reasoning="hm",
        parser="seed_oss",
    ),
    "minimax_m2": Output(
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        (W, N),
    ),
    "deepseek_v32": Output(
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">'
        'Paris</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        (W, N),
    ),
    "deepseek_v4": Output(
        "deepseek_v4",
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
        (N,),
    ),
    "glm45": Output(
        "glm45",
        "So.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        (W, N),
        "So.",
    ),
    "glm47": Output(
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call><tool_call>now</tool_call>",
        (W, N),
    ),
    "llama3_json": Output("llama3_json", f'{{"name": "get_weather", "parameters": {_ARGS}}}', (W,)),
    "llama3_json, two": Output(
        "llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {_ARGS}}}; {_NOW};', (W, N)
    ),
    "llama3_json, typed": Output(
        "llama3_json", f'\n{{"type": "function", "name": "get_weather", "parameters": {_ARGS}}}', (W,)
    ),
    "llama3_json, an answer": Output("llama3_json", '{"city": "Paris"}', (), '{"city": "Paris"}'),
    "llama3_json, code": Output("llama3_json", "<|python_tag|>print(1)", (), "<|python_tag|>print(1)"),
    "llama3_json, later": Output("llama3_json", f"So: {_OBJECT}", (), f"So: {_OBJECT}"),
    "pythonic": Output("pythonic", "[get_weather(city='Paris', days=2), now()]", (W, N)),
    "llama4_pythonic": Output(
        "llama4_pythonic", '<|python_start|>[get_weather(city="Paris", days=2)]<|python_end|>', (W,)
    ),
    "pythonic, an answer": Output("pythonic", "[1, 2] are numbers", (), "[1, 2] are numbers"),
    "lfm2": Output("lfm2", "<|tool_call_start|>[get_weather(city='Paris', days=2)]<|tool_call_end|>Now.", (W,), "Now."),
    "olmo3": Output("olmo3", "<function_calls>\nget_weather(city='Paris', days=2)\nnow()\n</function_calls>", (W, N)),
    "mistral": Output("mistral", f"[TOOL_CALLS]get_weather[ARGS]{_ARGS}[TOOL_CALLS]now[ARGS]{{}}", (W, N)),
    "mistral, no [ARGS]": Output("mistral", f"[TOOL_CALLS]get_weather{_ARGS}", (W,)),
    "mistral, ids": Output("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{_ARGS}", (W,)),
    "mistral, old form": Output("mistral", f"[TOOL_CALLS] [{_OBJECT}, {_NOW}]", (W, N)),
    "mistral_old": Output("mistral_old", f"[TOOL_CALLS] [{_OBJECT}, {_NOW}]", (W, N)),
    "mistral, thinking": Output(
        "mistral", f"[THINK]hm[/THINK]Yes.[TOOL_CALLS]get_weather[ARGS]{_ARGS}", (W,), "Yes.", "hm", "mistral"
    ),
    "granite": Output("granite", f"<|tool_call|>[{_OBJECT}]", (W,)),
    "nemotron": Output("nemotron", f"<TOOLCALL>[{_OBJECT}, {_NOW}]</TOOLCALL>", (W, N)),
    "apriel": Output("apriel", f"<tool_calls>[{_OBJECT}, {_NOW}]</tool_calls>", (W, N)),
    "minimax": Output("minimax", f"<tool_calls>\n{_OBJECT}\n{_NOW}\n</tool_calls>", (W, N)),
    "functionary_v3": Output(
        "functionary_v3", f"<function=get_weather>{_ARGS}</function><function=now>{{}}</function>", (W, N)
    ),
    "json": Output("json", f"[{_OBJECT}, {_NOW}]", (W, N)),
    "openai": Output(
        "openai",
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{_ARGS}<|call|>",
        (W,),
        reasoning="Think.",
        parser="openai",
    ),
    "openai, answer": Output(
        "openai",
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary<|message|>First.<|end|><|start|>"
        "assistant<|channel|>analysis<|message|>More.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>",
        (),
        "First.\nHello.",
        "Think.\nMore.",
    ),
    "openai, recipient first": Output(
        "openai", f" to=functions.get_weather<|channel|>commentary json<|message|>{_ARGS}", (W,)
    ),
    "deepseek_v3": Output(
        "deepseek_v3",
        f"{_BEGIN}{_ONE}function{_SEP}get_weather\n```json\n{_ARGS}\n```{_OVER}\n{_ONE}function{_SEP}now\n```json\n{{}}\n```"
        f"{_OVER}{_END}",
        (W, N),
    ),
    "deepseek_v31": Output(
        "deepseek_v31",
        f"I see.{_BEGIN}{_ONE}get_weather{_SEP}{_ARGS}{_OVER}{_ONE}now{_SEP}{{}}{_OVER}{_END}",
        (W, N),
        "I see.",
    ),
    "kimi_k2": Output(
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{_ARGS}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        (W, N),
    ),
}
