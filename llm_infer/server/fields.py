"""Fields of requests that a body's model does not have: what passes, what is refused, and what is only noted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.server.errors import bad_request
from llm_infer.server.protocol import Body

PASSES = frozenset(
    {
        *(
            "user",
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        ),
        *(
            "prompt_cache_options",
            "verbosity",
            "reasoning_effort",
            "stream_interval",
            "moderation",
        ),
    }
)
"""Fields that clients send and that change nothing here."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "suffix": (None, ""),
    "prompt_embeds": (None,),
    "documents": (None, []),
    "dimensions": (None,),
    "spaces_between_special_tokens": (None, True),
    "thinking_token_budget": (None,),
    "mm_processor_kwargs": (None,),
    "kv_transfer_params": (None,),
    "vllm_xargs": (None,),
    "early_stopping": (None, False),
}
"""Fields that are known and not supported: only these values mean nothing."""

REFUSED = {
    "chat_template": "the template of the server is used: see --chat-template",
    "guided_json": 'write structured_outputs: {"json": …}',
    "guided_regex": 'write structured_outputs: {"regex": …}',
    "guided_choice": 'write structured_outputs: {"choice": […]}',
    "guided_grammar": 'write structured_outputs: {"grammar": …}',
}
"""Fields that are refused whatever they hold but null, and what to do instead."""


def check(body: Body, *, strict: bool) -> list[str]:
    """Checks the fields of a body that its model does not have, and returns the names that nobody knows.

    Raises:
        ApiError: a field is known and not supported, or unknown with `strict`.
    """
    unknown = []
    for name, value in (body.model_extra or {}).items():
        if name in PASSES:
            continue
        if name in REFUSED:
            if value is not None:
                raise bad_request(f"{name} is not taken: {REFUSED[name]}", name, "unsupported_parameter")
        elif name in NEUTRAL:
            if not any(value == one and type(value) is type(one) for one in NEUTRAL[name]):
                raise bad_request(f"{name} is not supported", name, "unsupported_parameter")
        else:
            unknown.append(name)
    if unknown and strict:
        raise bad_request(f"unknown fields: {names(unknown)}", unknown[0][:64], "unknown_parameter")
    return unknown


def names(unknown: list[str] | Mapping[str, Any]) -> str:
    """Returns names of fields for a header or a log: few, short, and of printable ASCII."""
    shown = [ascii(name)[1:-1][:64] for name in list(unknown)[:16]]
    return ", ".join(name for name in shown if name.isprintable())
