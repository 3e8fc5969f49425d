"""Turns a conversation into prompt text with the chat template of a model, every failure into one clear line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from llm_infer.errors import RequestError
from llm_infer.text.template_sandbox import MAX_STEPS, TemplateSandbox


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
    """Prompt text for a conversation; encode it with `add_special_tokens=False`, the template writes them itself.

    Args:
        template: Jinja source, `Tokenizer.chat_template`.
        messages: each has a `role` and a `content`, which is a text, a list of `{"type": "text", "text": …}` parts, or
            None beside `tool_calls`. Parts are joined by newlines unless the template asks for parts.
        add_generation_prompt: end with the header of the assistant's answer.
        tools: JSON schemas of functions the model may call.
        bos_token, eos_token: texts the template may write.
        extra: further variables for the template (`enable_thinking`, `documents`, …).

    Raises:
        RequestError: the messages are malformed, or the template refuses them, is not valid, or oversteps its budget.
    """
    checked = [_checked_message(i, message) for i, message in enumerate(_as_list(messages))]
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RequestError(f"tools={tools!r:.60}: expected a list of JSON schemas of functions")
    compiled = _compile(template)
    if _wants_parts(template):
        checked = [_with_parts(message) for message in checked]
    variables = {
        **extra,
        "messages": checked,
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
    }
    return _render(compiled, variables)


@lru_cache(maxsize=32)
def _compile(template: str) -> CodeType:
    try:
        return TemplateSandbox().compile(template, name="chat template")
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
    except (SecurityError, RecursionError, OverflowError, MemoryError) as error:
        raise RequestError(f"the chat template cannot be compiled: {_reason(error)}") from None


def _render(compiled: CodeType, variables: Mapping[str, Any], max_steps: int = MAX_STEPS) -> str:
    sandbox = TemplateSandbox(max_steps)  # holds the budget of this rendering
    template = jinja2.Template.from_code(sandbox, compiled, sandbox.make_globals(None))
    try:
        return template.render(variables)
    except SecurityError as error:
        raise RequestError(f"the chat template was stopped: {_reason(error)}") from None
    except jinja2.UndefinedError as error:
        raise RequestError(f"the chat template uses something these messages do not have: {_reason(error)}") from None
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses these messages: {_reason(error)}") from None
    except Exception as error:  # a template is a program of somebody else's: whatever it does wrong fails the request
        raise RequestError(f"the chat template failed with {type(error).__name__}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@lru_cache(maxsize=32)
def _wants_parts(template: str) -> bool:
    """Whether the template reads `content` only as a list of parts: tried with a word in either form."""
    word = "probe-of-content"
    shown = []
    for content in (word, [{"type": "text", "text": word}]):
        variables = {"messages": [{"role": "user", "content": content}], "tools": None, "add_generation_prompt": True}
        try:
            text = _render(_compile(template), variables, max_steps=MAX_STEPS // 100)
        except RequestError:
            text = ""  # a template may refuse one of the forms: that answers the question
        shown.append(word in text)
    return shown == [False, True]


def _as_list(messages: object) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise RequestError(f"messages is a {type(messages).__name__}: expected a list of {{'role': …, 'content': …}}")
    return list(messages)


def _checked_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}: expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role is {role!r}: expected a text such as 'system', 'user' or 'assistant'")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if isinstance(content, str):
        return dict(message)
    if isinstance(content, (list, tuple)):
        return {**message, "content": "\n".join(_part_text(f"{where}.content[{i}]", p) for i, p in enumerate(content))}
    raise RequestError(f"{where}.content is {type(content).__name__}: expected a text or a list of text parts")


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f"{where} is of type {kind!r}: expected {{'type': 'text', 'text': …}} (text only)")


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
