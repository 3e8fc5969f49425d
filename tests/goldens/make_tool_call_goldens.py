"""Writes which texts xgrammar's structural tags take for forced tool calls: forms of calls that are written by hand here.

/tmp/goldens/bin/pip install xgrammar
/tmp/goldens/bin/python tests/goldens/make_tool_call_goldens.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xgrammar

Calls = list[tuple[str, dict[str, Any]]]

TOOLS = [
    {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
]

W = "get_weather"
CALLS: dict[str, Calls] = {
    "one": [(W, {"city": "Paris"})],
    "all": [(W, {"city": "Paris", "days": 2, "units": "C"})],
    "some": [(W, {"city": "Zürich, a<b> & c", "units": "F"})],
    "lines": [(W, {"city": "a\nb\n\n c"})],
    "none": [("now", {})],
    "two": [(W, {"city": "Paris", "days": 12}), ("now", {})],
    "three": [("now", {}), ("now", {}), (W, {"city": ""})],
    "missing": [(W, {"days": 2})],
    "empty": [(W, {})],
    "number as text": [(W, {"city": "Paris", "days": "two"})],
    "not in the list": [(W, {"city": "Paris", "units": "K"})],
    "unknown parameter": [(W, {"city": "Paris", "zip": 1})],
    "unknown function": [("rm", {"city": "Paris"})],
    "longer name": [("now2", {})],
    "parameter of none": [("now", {"a": 1})],
    "second wrong": [("now", {}), (W, {"days": 1})],
}


def value(one: object) -> str:
    return one if isinstance(one, str) else json.dumps(one)


def hermes(calls: Calls) -> str:
    bodies = [f'{{"name": "{name}", "arguments": {json.dumps(a, ensure_ascii=False)}}}' for name, a in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def llama(calls: Calls) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {json.dumps(a, ensure_ascii=False)}}}' for name, a in calls)


def qwen_coder(calls: Calls) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        inner = "".join(f"<parameter={key}>\n{value(v)}\n</parameter>\n" for key, v in arguments.items())
        return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def deepseek_v31(calls: Calls) -> str:
    inner = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(a, ensure_ascii=False)}<｜tool▁call▁end｜>"
        for name, a in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseek_v32(calls: Calls, name: str = "function_calls") -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        inner = "".join(
            f'<｜DSML｜parameter name="{key}" string="{str(isinstance(v, str)).lower()}">{value(v)}</｜DSML｜parameter>\n'
            for key, v in arguments.items()
        )
        return f'<｜DSML｜invoke name="{name}">\n{inner}</｜DSML｜invoke>\n'

    return f"\n\n<｜DSML｜{name}>\n{''.join(one(*call) for call in calls)}</｜DSML｜{name}>"


def deepseek_v4(calls: Calls) -> str:
    return deepseek_v32(calls, "tool_calls")


def kimi(calls: Calls) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>"
        f"{json.dumps(a, ensure_ascii=False)}<|tool_call_end|>"
        for i, (name, a) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def harmony(calls: Calls) -> str:
    return "".join(
        f"<|channel|>commentary to=functions.{name}<|constrain|>json<|message|>{json.dumps(a, ensure_ascii=False)}<|call|>"
        for name, a in calls
    )


def glm(calls: Calls) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        inner = "".join(f"<arg_key>{key}</arg_key><arg_value>{value(v)}</arg_value>" for key, v in arguments.items())
        return f"<tool_call>{name}{inner}</tool_call>"

    return "".join(one(*call) for call in calls)


FORMS: dict[str, tuple[str, Callable[[Calls], str]]] = {
    "qwen_3": ("hermes", hermes),
    "llama": ("llama3_json", llama),
    "qwen_3_coder": ("qwen3_coder", qwen_coder),
    "deepseek_v3_1": ("deepseek_v31", deepseek_v31),
    "deepseek_v3_2": ("deepseek_v32", deepseek_v32),
    "deepseek_v4": ("deepseek_v4", deepseek_v4),
    "kimi": ("kimi_k2", kimi),
    "harmony": ("openai", harmony),
    "glm_4_7": ("glm47", glm),
}


def variants(written: str) -> dict[str, str]:
    """The text and ways to damage its form."""
    return {
        "": written,
        "cut by one": written[:-1],
        "cut in the middle": written[: len(written) // 2],
        "without a beginning": written[1:],
        "other words": "I cannot help.",
        "nothing": "",
    }


def main() -> None:
    vocabulary = [*(bytes([i]) for i in range(256)), b"<eos>"]
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiler = xgrammar.GrammarCompiler(info)

    def accepts(compiled: xgrammar.CompiledGrammar, text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return matcher.accept_string(text) and matcher.accept_token(256)

    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    models: dict[str, Any] = {}
    for model, (format, write) in FORMS.items():
        tag = xgrammar.get_model_structural_tag(model, tools=tools, tool_choice="required", reasoning="disabled")
        compiled = compiler.compile_structural_tag(tag)
        cases = []
        for name, calls in CALLS.items():
            for damage, text in variants(write(calls)).items():
                if damage and name != "all":
                    continue
                good = not damage
                case = [f"{name}, {damage}" if damage else name, text, accepts(compiled, text), calls if good else None]
                cases.append(case)
        models[model] = {"format": format, "cases": cases}
    path = Path(__file__).parent / "tool_calls_xgrammar.json"
    found = {"xgrammar": version("xgrammar"), "tools": TOOLS, "models": models}
    text = json.dumps(found, ensure_ascii=False).replace(' [["one"', '\n[["one"').replace("], [", "],\n [")
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
