"""Encodes a conversation in a model's chat format, so that contents make no control tokens."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llm_infer.base.errors import RequestError
from llm_infer.text.chat_template import apply_chat_template
from llm_infer.text.messages import checked_messages, checked_tools
from llm_infer.text.tokenizer import Tokenizer


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Returns the token ids of a conversation, up to where the answer starts.

    Texts of control tokens (`<|im_end|>`) in messages of users, systems and tools, and in definitions of tools, are
    encoded as plain text; those in messages of the assistant stay tokens, as do added tokens that are not special
    (`<think>`). Where the template changes a content so that it cannot be found again, everything is encoded as it is.

    Args:
        tokenizer: the model's.
        messages, tools: see `apply_chat_template`.
        add_generation_prompt: end with the header of the assistant's answer.
        continue_final_message: end with the last message's content, which the answer then continues.
        chat_template: Jinja source, or the name of one of the model's templates; None chooses one of the model's.
        variables: further variables of the template, such as `enable_thinking`.

    Raises:
        RequestError: the model has no chat template that fits, or see `apply_chat_template`.
    """
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "add_generation_prompt and continue_final_message are both True: an answer begins a message or continues one; "
            "set add_generation_prompt=False to continue the last"
        )
    bos, eos = (
        None if i is None else tokenizer.decode([i], skip_special_tokens=False)
        for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    render = partial(
        apply_chat_template,
        _chosen_template(tokenizer, tools, chat_template),
        add_generation_prompt=add_generation_prompt,
        bos_token=bos,
        eos_token=eos,
        **checked_variables(variables),
    )
    checked, definitions = checked_messages(messages), checked_tools(tools)
    text = render(checked, tools=definitions)
    end = _end_of_last(partial(render, tools=definitions), checked, text) if continue_final_message else len(text)
    control = tokenizer.control_tokens
    contents = [message for message in checked if message["role"] != "assistant"]
    if control.within([contents, definitions]):
        marked = [message if message["role"] == "assistant" else control.marked(message) for message in checked]
        try:
            shown, literal = control.unmarked(render(marked, tools=control.marked(definitions)))
        except RequestError:  # the template looks closely at contents
            shown, literal = "", set()
        if shown == text:
            return tokenizer.encode_literally(text[:end], {place for place in literal if place < end})
    return tokenizer.encode(text[:end], add_special_tokens=False)


OURS = frozenset(
    {
        *(
            "messages",
            "tools",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template",
            "template",
            "tokenize",
        ),
        *(
            "bos_token",
            "eos_token",
            "padding",
            "truncation",
            "max_length",
            "return_tensors",
            "return_dict",
            "conversation",
        ),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Names that no variable of a template may have: arguments of ours, and of those who render templates elsewhere."""


def checked_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns variables for a template; raises RequestError where one has a name of OURS."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise RequestError(f"chat_template_kwargs={variables!r:.60}: expected a mapping of names to values")
    if taken := [name for name in variables if name in OURS]:
        raise RequestError(f"chat_template_kwargs has {taken[0]!r:.60}: that is no variable of a template")
    return dict(variables)


def _end_of_last(render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]], text: str) -> int:
    """Finds where the content of the last message ends in the text; white space that the template keeps counts to it."""
    if not messages:
        raise RequestError("continue_final_message=True without messages: there is none to continue")
    content = messages[-1]["content"]
    kept = content.rstrip()
    # Nobody can guess it, so no content holds it. Letters that no filter of a template changes.
    mark = "".join(chr(0xE000 + secrets.randbelow(0xF900 - 0xE000)) for _ in range(5))
    before, found, after = render(
        [*messages[:-1], {**messages[-1], "content": kept + mark + content[len(kept) :]}]
    ).rpartition(mark)
    before = before.replace(mark, "")  # a template may show a content twice
    if not found or before + after != text:
        raise RequestError(
            "continue_final_message=True: the chat template changes the last message, so that its end cannot be found; write "
            "the prompt yourself and use LLM.generate"
        )
    end = len(before)
    return end + len(content) - len(kept) if text.startswith(content[len(kept) :], end) else end


def _chosen_template(tokenizer: Tokenizer, tools: object, given: object) -> str:
    """Returns the template that is given, else the one for tools if there are tools and it, else the default one."""
    templates = tokenizer.chat_templates
    if given is not None:
        if not isinstance(given, str) or not given.strip():
            raise RequestError(f"chat_template={given!r:.60}: expected Jinja source, or one of {', '.join(templates)}")
        if given not in templates and "{{" not in given and "{%" not in given:
            raise RequestError(
                f"chat_template={given!r:.60}: expected Jinja source, which has {{{{ or {{%, or one of {', '.join(templates)}"
            )
        return templates.get(given, given)
    if not templates:
        raise RequestError(
            "this model has no chat template: use raw prompts (/v1/completions, LLM.generate, or generate --raw)"
        )
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        found = ", ".join(sorted(templates))
        raise RequestError(f"this model has no default chat template, only {found}: use raw prompts, or give tools")
    return templates["default"]
