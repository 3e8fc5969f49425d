"""Writes templates_transformers.json: digests of what transformers makes of published chat templates.

    python tests/goldens/make_template_goldens.py DIRECTORY_WITH_JINJA_FILES

Needs transformers and jinja2, no torch. The templates themselves are not committed. `strftime_now("…")` gives its
pattern here, so that a digest does not depend on the day.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a town, now.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Name of the town"},
                "unit": {"type": "string", "enum": ["C", "F"], "description": "Unit"},
            },
            "required": ["town"],
        },
    },
}
HELLO = {"role": "user", "content": " How is the weather in Zürich, at 12:30?\n"}
SYSTEM = {"role": "system", "content": "Be brief: <ten> words & no more."}
ANSWER = {"role": "assistant", "content": "Sunny, 21 °C."}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"sky": "clear", "C": 21}'}


def asks(arguments: Any, content: Any = "") -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


OBJECT = {"town": 'Zürich "HB"', "unit": "C", "days": 2}
TEXT = '{"town": "Zürich \\"HB\\"", "unit": "C", "days": 2}'
TURNS = [HELLO, ANSWER, {"role": "user", "content": "And tomorrow?"}]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [HELLO]},
    "plain, no header": {"messages": [HELLO], "add_generation_prompt": False},
    "system": {"messages": [SYSTEM, HELLO]},
    "several turns": {"messages": TURNS},
    "system, several turns, ended": {"messages": [SYSTEM, *TURNS, ANSWER], "add_generation_prompt": False},
    "thoughts": {"messages": [HELLO, {**ANSWER, "reasoning_content": "Look up."}, {"role": "user", "content": "Why?"}]},
    "tools": {"messages": [HELLO], "tools": [WEATHER]},
    "system, tools": {"messages": [SYSTEM, HELLO], "tools": [WEATHER]},
    "calls": {"messages": [HELLO, asks(OBJECT), RESULT], "tools": [WEATHER]},
    "calls, several turns": {"messages": [SYSTEM, HELLO, asks(OBJECT), RESULT, *TURNS[1:]], "tools": [WEATHER]},
    "calls as text, null content": {"messages": [HELLO, asks(TEXT, None), RESULT], "tools": [WEATHER]},
    "calls as text": {"messages": [HELLO, asks(TEXT), RESULT], "tools": [WEATHER]},
}


def digest(source: str, conversation: dict[str, Any]) -> str:
    """SHA-256 of the rendering, "error" where there is none."""
    given = {"tools": None, "add_generation_prompt": True, **conversation}
    messages = given.pop("messages")
    source = source.replace("strftime_now(", "(")
    try:
        (text,), _ = render_jinja_template([messages], chat_template=source, bos_token="<s>", eos_token="</s>", **given)
    except Exception:
        return "error"
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Renders every template with every conversation."""
    files = sorted(Path(sys.argv[1]).glob("*.jinja"))
    digests = {f.stem: {n: digest(f.read_text("utf-8"), c) for n, c in CONVERSATIONS.items()} for f in files}
    found = {"transformers": transformers.__version__, "conversations": CONVERSATIONS, "digests": digests}
    out = Path(__file__).with_name("templates_transformers.json")
    out.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
