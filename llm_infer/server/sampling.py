"""From the fields of a body to `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.base.errors import RequestError, UserError
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.frontend.prompts import require_streamable
from llm_infer.server.errors import ApiError, bad_request
from llm_infer.server.protocol import ChatRequest, CompletionRequest, Generation

AS_THEY_ARE = (
    *("best_of", "temperature", "top_p", "top_k", "min_p", "typical_p", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "logit_bias", "bad_words", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
    *("include_stop_str_in_output", "min_tokens", "truncate_prompt_tokens", "prompt_logprobs", "length_penalty"),
)
"""Fields that `SamplingParams` has by the same name; null stands for its default."""


DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "max_new_tokens")
"""Parameters that a server may have defaults of its own for, by the names of generation_config.json."""


def checked_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns defaults of parameters.

    Raises:
        UserError: one is unknown or out of range.
    """
    for name, value in defaults.items():
        if name not in DEFAULTS or isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{name}={value!r:.60}: expected numbers for some of {', '.join(DEFAULTS)}")
    known = {name: value for name, value in defaults.items() if name != "max_new_tokens"}
    SamplingParams(max_tokens=defaults.get("max_new_tokens", 16), **known)
    return dict(defaults)


def sampling_params(body: Generation, defaults: Mapping[str, Any]) -> SamplingParams:
    """Returns the parameters that a body asks for; those that it does not name are `defaults`, then ours.

    Raises:
        ApiError: they contradict each other.
    """
    given: dict[str, Any] = {name: value for name in AS_THEY_ARE if (value := getattr(body, name)) is not None}
    most = defaults.get("max_new_tokens")
    if not body.use_beam_search:
        given = {name: value for name, value in defaults.items() if name in AS_THEY_ARE} | given
    count = body.n or 1
    if body.use_beam_search:
        given["beam_width"] = count
    else:
        given["n"] = count
    if body.seed is not None:
        given["seed"] = body.seed % 2**64  # a draw's seed has no sign
    if body.allowed_token_ids is not None:
        given["allowed_token_ids"] = tuple(body.allowed_token_ids)
    if isinstance(body, ChatRequest):
        given["max_tokens"] = body.max_completion_tokens or body.max_tokens or most
        given["logprobs"] = _chat_logprobs(body)
    elif isinstance(body, CompletionRequest):
        given["max_tokens"] = max(1, 16 if body.max_tokens is None else body.max_tokens)
        given["logprobs"] = body.logprobs
        if body.echo and body.logprobs is not None:
            given["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    given["structured_outputs"] = _structured(body)
    try:
        params = SamplingParams(**given)
        if body.stream:
            require_streamable(params)
    except RequestError as error:
        raise _named(error) from None
    return params


def _chat_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    return (body.top_logprobs or 0) if body.logprobs else None


def _structured(body: Generation) -> StructuredOutputsParams | None:
    form, given = body.response_format, body.structured_outputs
    if form is not None and form.type != "text" and given is not None:
        raise bad_request("give response_format or structured_outputs, not both", "response_format", "invalid_value")
    try:
        if given is not None:
            values = given.model_dump(by_alias=True, exclude_none=True)
            return StructuredOutputsParams(**values)
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if form.json_schema is None:
            raise bad_request(
                "response_format of type json_schema needs json_schema", "response_format", "invalid_value"
            )
        return StructuredOutputsParams(json=form.json_schema.schema_ or {})
    except RequestError as error:
        raise bad_request(
            str(error), "response_format" if given is None else "structured_outputs", "invalid_value"
        ) from None


def _named(error: RequestError) -> ApiError:
    """Returns the error as the client's, with the parameter that its message begins with."""
    word = str(error).split("=")[0].split(" ")[0].split("[")[0]
    return bad_request(str(error), word if word.isidentifier() else None, "invalid_value")
