"""/v1/completions: continues prompts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from llm_infer.base.outputs import CompletionOutput, RequestOutput
from llm_infer.frontend.prompts import Asked, Prompt, PromptReader
from llm_infer.server.choices import Gathered, TokenTexts, usage_of
from llm_infer.server.errors import bad_request
from llm_infer.server.exchange import Exchange
from llm_infer.server.generation import finished, reply_head, stream
from llm_infer.server.protocol import MAX_SEQUENCES, CompletionRequest
from llm_infer.server.sampling import sampling_params


async def completions(exchange: Exchange, data: bytes) -> None:
    """Answers a request for completions."""
    body = await exchange.parsed(CompletionRequest, data)
    service = exchange.service
    service.require_ready()
    params = sampling_params(body, service.options.default_sampling)
    prompts = as_prompts(body.prompt)
    if len(prompts) * params.num_sequences > MAX_SEQUENCES:
        raise bad_request(
            f"{len(prompts)} prompts with n={params.n}: too many choices in one request", "n", "invalid_value"
        )
    if body.max_tokens == 0 and body.stream:
        raise bad_request("max_tokens=0 cannot stream: nothing is generated", "max_tokens", "invalid_value")
    if body.stream and body.echo and (params.n > 1 or body.logprobs is not None):
        raise bad_request("echo with n or logprobs cannot stream", "echo", "unsupported_parameter")
    service.admit(len(prompts))
    read = partial(
        read_prompts,
        service.prompts,
        prompts,
        params,
        body.priority,
        salted(exchange, body.cache_salt),
        body.add_special_tokens,
    )
    asked = await service.in_worker(read)
    if body.max_tokens == 0:
        asked = [replace(one, prompt_only=True) for one in asked]
    texts = TokenTexts(service.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    head = reply_head("cmpl", "text_completion", body, exchange)
    if body.stream:
        await _stream(exchange, body, asked, head, texts)
        return
    results = await finished(exchange, asked)
    choices = [
        _choice(body, texts, index * len(result.outputs) + output.index, result, output)
        for index, result in enumerate(results)
        for output in result.outputs
    ]
    counts = usage_of(results, new_tokens=0 if body.max_tokens == 0 else None)
    await exchange.reply({**head, "choices": choices, "usage": counts})


def as_prompts(given: Any) -> list[Prompt]:
    """Returns one or several prompts, texts or ids, as a list."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


def read_prompts(
    reader: PromptReader,
    prompts: list[Prompt],
    params: Any,
    priority: int | None,
    salt: str | None,
    add_special_tokens: bool | None,
) -> list[Asked]:
    """Encodes prompts and compiles grammars; for a worker thread."""
    if add_special_tokens is False:
        encode = reader.tokenizer.encode
        prompts = [
            {"prompt": one, "prompt_token_ids": encode(one, add_special_tokens=False)} if isinstance(one, str) else one
            for one in prompts
        ]
    return reader.read(prompts, [params] * len(prompts), priority=priority, cache_salt=salt)


def salted(exchange: Exchange, given: str | None) -> str | None:
    """Returns the salt of cached prefixes: clients with different keys share none."""
    return given if exchange.salt is None else f"{exchange.salt}:{given or ''}"


def _choice(
    body: CompletionRequest, texts: TokenTexts, index: int, result: RequestOutput, output: CompletionOutput
) -> dict[str, Any]:
    ids, positions = list(output.token_ids), list(output.logprobs or [])
    text = output.text
    if body.max_tokens == 0:
        ids, positions, text = [], [], ""
    prompt = result.prompt_token_ids
    echoed = ""
    if body.echo:
        echoed = _shown(texts, result.prompt, prompt)
    logprobs = None
    if body.logprobs is not None:
        before = list(prompt) if body.echo else []
        found = [*(result.prompt_logprobs or []), *positions] if body.echo else positions
        logprobs = texts.completion([*before, *ids], found, 0)
    return {
        "index": index,
        "text": echoed + text,
        "logprobs": logprobs,
        "finish_reason": "length" if body.max_tokens == 0 else output.finish_reason,
        "stop_reason": output.stop_reason,
        **({"prompt_logprobs": texts.prompt(result.prompt_logprobs or [])} if body.prompt_logprobs is not None else {}),
        **({"token_ids": ids, "prompt_token_ids": list(prompt)} if body.return_token_ids else {}),
        **({} if output.score is None else {"score": output.score}),
    }


def _shown(texts: TokenTexts, text: str | None, ids: list[int]) -> str:
    """Returns the text of a prompt as it is echoed."""
    return texts.tokenizer.decode(ids, skip_special_tokens=False) if text is None else text


async def _stream(
    exchange: Exchange, body: CompletionRequest, asked: list[Asked], head: dict[str, Any], texts: TokenTexts
) -> None:
    offsets = [0] * (len(asked) * (body.n or 1))

    def first() -> list[dict[str, Any]]:
        if not body.echo:
            return []
        shown = [_shown(texts, one.text, one.ids) for one in asked]
        return [{"index": i, "text": text, "logprobs": None, "finish_reason": None} for i, text in enumerate(shown)]

    def choices(index: int, new: Gathered) -> list[dict[str, Any]]:
        logprobs = None
        if body.logprobs is not None:
            logprobs = texts.completion(new.token_ids, new.positions, offsets[index])
            offsets[index] += sum(map(len, logprobs["tokens"]))
        elif not new.text and new.finish_reason is None and not body.return_token_ids:
            return []  # half a character, or what may become a stop string
        return [
            {
                "index": index,
                "text": new.text,
                "logprobs": logprobs,
                "finish_reason": new.finish_reason,
                "stop_reason": new.stop_reason,
                **({"token_ids": new.token_ids} if body.return_token_ids else {}),
            }
        ]

    await stream(exchange, asked, head, body, first=first, choices=choices)
