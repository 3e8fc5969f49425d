"""Writes templates_transformers.json: digests of what transformers makes of published chat templates and vocabularies.

    python tests/goldens/make_template_goldens.py DIRECTORY

The directory holds templates/*.jinja and vocab/ggml-vocab-*.gguf, which are not committed. Needs transformers, jinja2,
and for the ids gguf and torch. `strftime_now("…")` gives its pattern here, so that a digest does not depend on the day.
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

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# vocabulary → its template: a file of the published ones, or its source
FAMILIES = {
    "qwen2": "Qwen-Qwen2.5-7B-Instruct",
    "qwen35": "Qwen3.5-4B",
    "llama-bpe": "meta-llama-Llama-3.1-8B-Instruct",
    "phi-3": "microsoft-Phi-3.5-mini-instruct",
    "llama-spm": LLAMA_2,
    "gpt-2": LLAMA_2,
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


def ids_digests(directory: Path, family: str) -> dict[str, str]:
    """SHA-256 of the ids of each conversation, in JSON."""
    file = f"ggml-vocab-{family}.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "vocab", gguf_file=file)
    template = FAMILIES[family]
    if "{%" not in template:
        template = (directory / "templates" / f"{template}.jinja").read_text("utf-8")
    template = template.replace("strftime_now(", "(")
    found = {}
    for name, conversation in CONVERSATIONS.items():
        if not name.startswith("calls as text"):
            given = {"add_generation_prompt": True, **conversation}
            messages = given.pop("messages")
            ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **given)
            found[name] = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return found


def main() -> None:
    """Renders every template with every conversation, and encodes them for some families."""
    directory = Path(sys.argv[1])
    files = sorted((directory / "templates").glob("*.jinja"))
    digests = {f.stem: {n: digest(f.read_text("utf-8"), c) for n, c in CONVERSATIONS.items()} for f in files}
    # Of SentencePiece vocabularies transformers reads a GGUF file so that no space follows a special token; llama.cpp,
    # and the tokenizer.json files that these models publish, have one.
    byte_level = [family for family in FAMILIES if family not in ("phi-3", "llama-spm")]
    ids = {family: ids_digests(directory, family) for family in byte_level}
    found = {
        "transformers": transformers.__version__,
        "conversations": CONVERSATIONS,
        "digests": digests,
        "families": FAMILIES,
        "ids": ids,
    }
    out = Path(__file__).with_name("templates_transformers.json")
    out.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
