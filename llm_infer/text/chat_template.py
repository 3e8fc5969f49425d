"""Turns a conversation into prompt text with a model's chat template, and every failure into one clear line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llm_infer.base.errors import RequestError
from llm_infer.text.messages import checked_messages, checked_tools, with_calls, with_parts
from llm_infer.text.template_process import PROCESSES, StoppedError


def apply_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **extra: Any,
) -> str:
    """Returns the prompt text of a conversation; encode it with `add_special_tokens=False`, as the template writes them itself.

    Args:
        template: Jinja source, one of `Tokenizer.chat_templates`.
        messages: each has a `role` and a `content`, which is a text, a list of `{"type": "text", "text": …}` parts, or
            None for an assistant or a tool. Parts are joined by newlines unless the template asks for parts. The
            `arguments` of `tool_calls` are an object or its JSON text; the template gets the form it needs.
        add_generation_prompt: ends the text with the header of the assistant's answer.
        tools: JSON schemas of functions that the model may call.
        bos_token, eos_token: texts that the template may write.
        extra: further variables for the template (`enable_thinking`, `documents`, …).

    Raises:
        RequestError: the messages are malformed, or the template refuses them, is not valid, or takes more time or
            memory than `template_process.Limits`.
    """
    checked = checked_messages(messages)
    definitions = checked_tools(tools)
    if any(message.get("tool_calls") for message in checked):
        as_text, null_content = _form_of_calls(template)
        checked = [with_calls(m, arguments_as_text=as_text, null_content=null_content) for m in checked]
    if _wants_parts(template):
        checked = [m if m["content"] is None else with_parts(m) for m in checked]
    variables = {
        "documents": None,
        **extra,
        "messages": checked,
        "tools": definitions,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
    }
    return PROCESSES.render(template, variables)


def why_invalid(template: str) -> str | None:
    """Returns what is wrong with a template that is no Jinja; None if it is, whatever it makes of messages."""
    try:
        PROCESSES.render(template, {"messages": [], "tools": None, "documents": None, "add_generation_prompt": True})
    except RequestError as error:
        return str(error) if "not valid Jinja" in str(error) else None
    return None


@lru_cache(maxsize=32)
def _wants_parts(template: str) -> bool:
    """Checks whether the template reads `content` only as a list of parts, by trying a word in either form."""
    word = "probe-of-content"
    plain = {"role": "user", "content": word}
    return [word in _tried(template, [message], None) for message in (plain, with_parts(plain))] == [False, True]


@lru_cache(maxsize=32)
def _form_of_calls(template: str) -> tuple[bool, bool]:
    """Returns the form in which the template shows tool calls, the first that works: arguments as text, empty content as None."""
    word = "probe-of-arguments"
    call = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": {"key": word}}}
    user = {"role": "user", "content": "Hi"}
    asks = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "probe", "tool_call_id": "probe0000", "content": "Hi"}
    parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "Hi"}}, "required": ["key"]}
    function = {"name": "probe", "description": "Hi", "parameters": parameters}
    tools = [{"type": "function", "function": function}]  # some templates need them
    forms = [(as_text, null_content) for null_content in (False, True) for as_text in (False, True)]
    for as_text, null_content in forms:
        asked = with_calls(asks, arguments_as_text=as_text, null_content=null_content)
        messages = [user, asked, result]
        if _wants_parts(template):
            messages = [m if m["content"] is None else with_parts(m) for m in messages]
        if word in _tried(template, messages, tools):
            return as_text, null_content
    return forms[0]


def _tried(template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Renders messages; returns nothing where the template refuses them, which answers the question."""
    others = {"documents": None, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    try:
        return PROCESSES.render(template, {"messages": messages, "tools": tools, **others})
    except StoppedError:
        raise
    except RequestError:
        return ""
