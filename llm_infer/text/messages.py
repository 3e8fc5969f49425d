"""Checks a conversation in OpenAI's form and brings it into the one form that chat templates are written for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llm_infer.base.errors import RequestError

_NO_CONTENT = ("assistant", "tool")  # roles whose `content` clients send as null
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of an assistant's thoughts


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Returns the messages with a text as `content`, without keys that hold None, and with thoughts under both usual names.

    Raises:
        RequestError: a message is malformed; the error says which, and what was expected.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise RequestError(f"messages is a {type(messages).__name__}: expected a list of {{'role': …, 'content': …}}")
    return [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def checked_tools(tools: object) -> list[Any] | None:
    """Returns definitions of tools as a list; None if there are none.

    Raises:
        RequestError: they are not a list of objects.
    """
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"tools={tools!r:.60}: expected a list of JSON schemas of functions")
    return list(tools)


def with_calls(message: dict[str, Any], *, arguments_as_text: bool, null_content: bool) -> dict[str, Any]:
    """Returns the message with its tool calls in the form that a template needs.

    Args:
        arguments_as_text: `arguments` become JSON text; otherwise text that holds a JSON object becomes that object.
        null_content: an empty `content` beside calls becomes None.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    content = None if null_content and message["content"] == "" else message["content"]
    return {**message, "content": content, "tool_calls": [_with_arguments(call, arguments_as_text) for call in calls]}


def with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Returns the message with its `content` as a list of one part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _checked_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}: expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role is {role!r}: expected a text such as 'system', 'user' or 'assistant'")
    calls = message.get("tool_calls")
    if calls is not None and not _are_calls(calls):
        raise RequestError(f"{where}.tool_calls is {calls!r:.60}: expected a list of {{'function': {{'name': …}}}}")
    if content is None and (role in _NO_CONTENT or calls):
        content = ""
    elif isinstance(content, (list, tuple)):
        content = "\n".join(_part_text(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    elif not isinstance(content, str):
        raise RequestError(f"{where}.content is {type(content).__name__}: expected a text or a list of text parts")
    plain = {key: value for key, value in message.items() if value is not None}  # clients send null for "not there"
    thoughts = next((plain[name] for name in _REASONING if name in plain), None)
    if thoughts is not None:
        plain = {"thinking": thoughts, **plain, "reasoning_content": thoughts}
    return {**plain, "content": content}


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f"{where} is of type {kind!r}: expected {{'type': 'text', 'text': …}} (text only)")


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list | tuple) and all(
        isinstance(call, Mapping) and isinstance(call.get("function", {}), Mapping) for call in calls
    )


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], as_text)}
    if "arguments" not in call:
        return dict(call)
    arguments = call["arguments"]
    if arguments is None or arguments == "":  # a function without parameters
        arguments = {}
    if as_text:
        try:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"the arguments of a tool call are not plain values, as JSON has them: {error}"
            ) from None
        return {**call, "arguments": text}
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):  # a model wrote it, right or wrong: the template shows it as it is
            decoded = None
        arguments = decoded if isinstance(decoded, dict) else arguments
    return {**call, "arguments": arguments}
