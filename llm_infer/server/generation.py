"""What completions and chat completions do alike: run a job to its end, or stream it event by event."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llm_infer.base.outputs import RequestOutput
from llm_infer.frontend.prompts import Asked
from llm_infer.server.choices import Gathered, gathered, require_success, usage, usage_of
from llm_infer.server.exchange import DONE, Exchange, encoded, event
from llm_infer.server.protocol import Generation
from llm_infer.server.service import Ticket

R = TypeVar("R")

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers of streams skip; an event without choices breaks some."""


def reply_head(prefix: str, kind: str, body: Generation, exchange: Exchange) -> dict[str, Any]:
    """Returns the fields that each answer, and each event of a stream, begins with."""
    name = body.request_id or secrets.token_hex(12)
    served = exchange.service.names
    return {
        "id": f"{prefix}-{name}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model if body.model in served else served[0],
    }


async def finished(exchange: Exchange, asked: Sequence[Asked]) -> list[RequestOutput]:
    """Runs prompts to their end.

    Raises:
        ApiError: one of them failed, or is not acceptable.
    """
    async with exchange.service.running(asked, stream=False) as ticket:
        _note(exchange, ticket)
        found = await results_of(ticket, RequestOutput)
        _note(exchange, ticket, found)
        return found


async def results_of(ticket: Ticket, kind: type[R]) -> list[R]:
    """Waits for the end of a job and returns its results, which are of this kind.

    Raises:
        ApiError: the job failed, or one of its samples did.
    """
    while True:
        for update in await ticket.news():
            require_success(update)
            if update.results is not None:
                return [one for one in update.results if isinstance(one, kind)]


def _note(exchange: Exchange, ticket: Ticket, results: Sequence[RequestOutput] = ()) -> None:
    """Notes what a trace tells of a request, by the semantic conventions for generative models."""
    exchange.facts |= {
        "gen_ai.request.model": exchange.service.names[0],
        "gen_ai.usage.input_tokens": ticket.prompt_tokens,
        "llm_infer.request_id": exchange.request_id,
    }
    if results:
        outputs = [output for one in results for output in one.outputs]
        exchange.facts |= {
            "gen_ai.usage.output_tokens": sum(len(output.token_ids) for output in outputs),
            "gen_ai.response.finish_reasons": [str(output.finish_reason) for output in outputs],
        }
        if (times := results[0].metrics) is not None:
            exchange.facts |= {
                "llm_infer.queue_seconds": times.queue,
                "gen_ai.server.time_to_first_token": times.time_to_first_token,
            }


Choices = Callable[[int, Gathered], list[dict[str, Any]]]


async def stream(
    exchange: Exchange,
    asked: Sequence[Asked],
    head: dict[str, Any],
    body: Generation,
    *,
    first: Callable[[], list[dict[str, Any]]],
    choices: Choices,
) -> None:
    """Streams prompts: one write for all that is pending, one event for each choice.

    Args:
        exchange: where to.
        asked: the prompts.
        head: what each event begins with.
        body: its wishes about the stream.
        first: the choices that stand in events before any text.
        choices: makes the choices, each an event, of what is new of a choice.
    """
    options = body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    running_usage = options is not None and bool(options.continuous_usage_stats)
    prefix = b"data: " + encoded(head)[:-1] + b',"choices":['
    service, n = exchange.service, body.n or 1
    new_tokens = 0

    def frame(choice: dict[str, Any], ticket: Ticket) -> bytes:
        text = encoded(choice)
        if running_usage:
            counts = encoded(usage(ticket.prompt_tokens, new_tokens))
            return prefix + text + b'],"usage":' + counts + b"}\n\n"
        return prefix + text + (b'],"usage":null}\n\n' if with_usage else b"]}\n\n")

    async with service.running(asked, stream=True) as ticket:
        _note(exchange, ticket)
        exchange.ticket = ticket
        # A request that is refused, or ends at once, gets a status of its own: so the first news are awaited.
        updates = await ticket.news()
        found = gathered(updates, n)
        await exchange.begin_stream()
        if begin := b"".join(frame(choice, ticket) for choice in first()):
            await exchange.frames(begin)
        while True:
            out = []
            for index, new in found.items():
                new_tokens += len(new.token_ids)
                out += [frame(choice, ticket) for choice in choices(index, new)]
            results = next((one.results for one in updates if one.results is not None), None)
            if results is not None:
                whole = [one for one in results if isinstance(one, RequestOutput)]
                _note(exchange, ticket, whole)
                if with_usage:
                    out.append(event({**head, "choices": [], "usage": usage_of(whole, new_tokens=new_tokens)}))
                await exchange.end_stream(b"".join(out) + DONE)
                return
            if out:
                await exchange.frames(b"".join(out))
            updates = await ticket.news()
            if not updates:
                await exchange.frames(KEEP_ALIVE)
            found = gathered(updates, n)
