"""/v1/chat/completions: answers conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_infer.base.outputs import CompletionOutput, RequestOutput
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.frontend.prompts import Asked
from llm_infer.server.answers import Reading, reading_of, wanted_tools
from llm_infer.server.choices import Gathered, TokenTexts, usage_of
from llm_infer.server.completions import salted
from llm_infer.server.errors import bad_request
from llm_infer.server.exchange import Exchange
from llm_infer.server.generation import finished, reply_head, stream
from llm_infer.server.protocol import ChatRequest, Message
from llm_infer.server.sampling import sampling_params
from llm_infer.server.service import Service
from llm_infer.text.chat_prompt import chat_ids
from llm_infer.text.output_parsing.chat_output import ChatOutput


async def chat_completions(exchange: Exchange, data: bytes) -> None:
    """Answers a request for chat completions."""
    body = await exchange.parsed(ChatRequest, data)
    service = exchange.service
    service.require_ready()
    params = sampling_params(body, service.options.default_sampling)
    messages = plain_messages(body.messages)
    salt = salted(exchange, body.cache_salt)
    service.admit(1)

    tools = wanted_tools(body)

    def read() -> tuple[list[Asked], Reading]:
        ids = conversation_ids(service, messages, body, tools)
        reading, grammar = reading_of(body, tools, service.formats, service.tokenizer, ids)
        changed = params
        if grammar is not None:
            # What ends a forced call is its form: a stop string inside its arguments would only break it.
            form = StructuredOutputsParams(grammar=grammar)
            changed = replace(changed, structured_outputs=form, stop=(), include_stop_str_in_output=False)
        if reading.with_special_tokens:
            changed = replace(changed, skip_special_tokens=False)
        return service.prompts.read([ids], [changed], priority=body.priority, cache_salt=salt), reading

    asked, reading = await service.in_worker(read)
    texts = TokenTexts(service.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    if body.stream:
        head = reply_head("chatcmpl", "chat.completion.chunk", body, exchange)
        await _stream(exchange, body, asked, reading, head, texts)
        return
    head = reply_head("chatcmpl", "chat.completion", body, exchange)
    (result,) = await finished(exchange, asked)
    answers = [_answer(reading, output) for output in result.outputs]
    choices = [_choice(body, texts, *pair) for pair in zip(result.outputs, answers, strict=True)]
    counts = usage_of([result])
    if reading.reasoning is not None:
        thoughts = [str(one.message().get("reasoning", "")) for one in answers]
        numbers = [len(service.tokenizer.encode(text, add_special_tokens=False)) for text in thoughts]
        counts["completion_tokens_details"] = {"reasoning_tokens": sum(numbers)}
    await exchange.reply({**head, "choices": choices, "usage": counts, **_of_prompt(body, texts, result)})


def _answer(reading: Reading, output: CompletionOutput) -> ChatOutput:
    answer, scanner = ChatOutput(), reading.scanner()
    pieces = scanner.push(reading.shown(output.text, output.finish_reason)) + scanner.finish()
    answer.push(reading.wanted(pieces))
    return answer


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Returns messages as templates take them.

    Raises:
        ApiError: a part of a content is no text; nothing is ever fetched.
    """
    found = []
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad_request(
                    f"messages[{i}].content[{j}].type: expected a part of type text", "messages", "unsupported_content"
                )
        found.append(message.model_dump(exclude_none=True))
    return found


def conversation_ids(
    service: Service, messages: list[dict[str, Any]], body: Any, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Returns the ids of a conversation; for a worker thread.

    Args:
        service: knows the model and the template.
        messages: the conversation.
        body: has wishes about the template; null stands for what the server does.
        tools: what the model may call.
    """
    given: Mapping[str, Any] = body.chat_template_kwargs or {}
    continues = bool(body.continue_final_message)
    begins = body.add_generation_prompt
    return chat_ids(
        service.tokenizer,
        messages,
        tools=tools or None,
        add_generation_prompt=(not continues) if begins is None else begins,
        continue_final_message=continues,
        chat_template=service.options.chat_template,
        variables={**service.options.default_chat_template_kwargs, **given},
    )


def _of_prompt(body: ChatRequest, texts: TokenTexts, result: RequestOutput) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        found["prompt_logprobs"] = texts.prompt(result.prompt_logprobs or [])
    if body.return_token_ids:
        found["prompt_token_ids"] = list(result.prompt_token_ids)
    return found


def _choice(body: ChatRequest, texts: TokenTexts, output: CompletionOutput, answer: ChatOutput) -> dict[str, Any]:
    logprobs = texts.chat(output.token_ids, output.logprobs or [], body.top_logprobs or 0) if body.logprobs else None
    return {
        "index": output.index,
        "message": answer.message(),
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason(output.finish_reason or "abort"),
        "stop_reason": output.stop_reason,
        **({"token_ids": list(output.token_ids)} if body.return_token_ids else {}),
    }


async def _stream(
    exchange: Exchange, body: ChatRequest, asked: list[Asked], reading: Reading, head: dict[str, Any], texts: TokenTexts
) -> None:
    answers = [(ChatOutput(), reading.scanner()) for _ in range(body.n or 1)]

    def piece(index: int, delta: dict[str, Any], **others: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **others}

    def first() -> list[dict[str, Any]]:
        return [piece(index, {"role": "assistant", "content": ""}) for index in range(len(answers))]

    def choices(index: int, new: Gathered) -> list[dict[str, Any]]:
        answer, scanner = answers[index]
        pieces = scanner.push(reading.shown(new.text, new.finish_reason))
        if new.finish_reason is not None:
            pieces += scanner.finish()
        deltas = answer.push(reading.wanted(pieces))
        others: dict[str, Any] = {"token_ids": new.token_ids} if body.return_token_ids else {}
        if body.logprobs and new.token_ids:
            others["logprobs"] = texts.chat(new.token_ids, new.positions, body.top_logprobs or 0)
        if others and not deltas:
            deltas.append({"content": ""})
        found = [piece(index, delta, **(others if number == 0 else {})) for number, delta in enumerate(deltas)]
        if new.finish_reason is not None:
            reason = answer.finish_reason(new.finish_reason)
            found.append(piece(index, {}, finish_reason=reason, stop_reason=new.stop_reason))
        return found

    await stream(exchange, asked, head, body, first=first, choices=choices)
