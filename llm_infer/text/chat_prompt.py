"""Encodes a conversation in a model's chat format, so that contents make no control tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
) -> list[int]:
    """Returns the token ids of a conversation, up to where the answer starts.

    Texts of control tokens (`<|im_end|>`) in messages of users, systems and tools, and in definitions of tools, are
    encoded as plain text; those in messages of the assistant stay tokens, as do added tokens that are not special
    (`<think>`). Where the template changes a content so that it cannot be found again, everything is encoded as it is.

    Raises:
        RequestError: the model has no chat template that fits, or see `apply_chat_template`.
    """
    bos, eos = (
        None if i is None else tokenizer.decode([i], skip_special_tokens=False)
        for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    render = partial(
        apply_chat_template,
        _chosen_template(tokenizer, tools),
        add_generation_prompt=add_generation_prompt,
        bos_token=bos,
        eos_token=eos,
    )
    checked, definitions = checked_messages(messages), checked_tools(tools)
    text = render(checked, tools=definitions)
    control = tokenizer.control_tokens
    contents = [message for message in checked if message["role"] != "assistant"]
    if control.within([contents, definitions]):
        marked = [message if message["role"] == "assistant" else control.marked(message) for message in checked]
        try:
            shown, literal = control.unmarked(render(marked, tools=control.marked(definitions)))
        except RequestError:  # the template looks closely at contents
            shown, literal = "", set()
        if shown == text:
            return tokenizer.encode_literally(text, literal)
    return tokenizer.encode(text, add_special_tokens=False)


def _chosen_template(tokenizer: Tokenizer, tools: object) -> str:
    """Returns the template for tools if there are tools and such a template, else the default one, as transformers does."""
    templates = tokenizer.chat_templates
    if not templates:
        raise RequestError("this model has no chat template: use raw prompts (LLM.generate, or --raw)")
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        found = ", ".join(sorted(templates))
        raise RequestError(f"this model has no default chat template, only {found}: use raw prompts, or give tools")
    return templates["default"]
