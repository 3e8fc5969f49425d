"""The raw client: bytes cut anywhere, kept connections, and whatever a server does wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_infer.base.errors import UserError
from llm_infer.bench.serving.client import Client, Outcome, Target
from llm_infer.bench.serving.events import Events
from llm_infer.bench.serving.response import MalformedResponse, Response
from tests.bench_serving.fake_server import DONE, STREAM_HEAD, chunk, event, faked, plain, three_words, usage, word

STREAM = (
    b": a comment\n\n"
    + event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    + word('a "text":"x" \\', chat=True)
    + b'event: delta\r\ndata: {"choices": [{"text": "b"}]}\r\n\r\n'
    + word("ć\n\n", chat=True)
    + event(choices=[{"delta": {}, "finish_reason": "length"}])
    + usage(5, 3)
    + DONE
)


def read_in_parts(parts: list[bytes]) -> tuple[Response, Events]:
    """A stream as the client reads it when the network hands it over in these parts."""
    events = Events(keep=True)
    response = Response(lambda _: events.feed)
    for part in parts:
        response.feed(part)
    events.end()
    return response, events


@pytest.mark.parametrize("size", [6, 50, 4096])
def test_a_stream_reads_the_same_wherever_it_is_cut(size: int) -> None:
    chunks = b"".join(chunk(STREAM[at : at + size]) for at in range(0, len(STREAM), size))
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + STREAM_HEAD + chunks + b"0\r\nX-Trailer: 1\r\n\r\n"
    cuts = [[data[:at], data[at:]] for at in range(len(data) + 1)]
    every_byte = [data[at : at + 1] for at in range(len(data))]
    for parts in [*cuts, every_byte]:
        response, events = read_in_parts(parts)
        assert response.complete and response.reusable and response.status == 200
        assert len(events.times) == 3 and events.done and events.error is None
        assert events.usage == {"prompt_tokens": 5, "completion_tokens": 3}
        assert events.text() == 'a "text":"x" \\bć\n\n'


def test_events_with_text_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = json.loads
    monkeypatch.setattr("llm_infer.bench.serving.events.json.loads", lambda data: decoded.append(data) or decode(data))
    events = Events()
    for data in [*([word(" and")] * 512), usage(3, 512), DONE]:
        events.feed(data)
    assert len(events.times) == 512 and events.done and len(decoded) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        STREAM_HEAD + b"x\r\n",
        STREAM_HEAD + b"3\r\nabcde",
        b"HTTP/1.1 200 X\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_wherever_it_is_cut(data: bytes) -> None:
    for at in range(len(data)):
        with pytest.raises(MalformedResponse):
            read_in_parts([data[:at], data[at:]])


def test_a_counted_body_ends_with_its_length_and_any_other_with_the_connection() -> None:
    parts: list[bytes] = []
    counted = Response(lambda _: parts.append)
    counted.feed(plain(200, "x")[:-1])
    assert not counted.complete
    counted.close()
    assert not counted.complete
    until_closed = Response(lambda _: parts.append)
    until_closed.feed(b"HTTP/1.1 200 OK\r\n\r\nab")
    assert not until_closed.complete
    until_closed.close()
    assert until_closed.complete and not until_closed.reusable


def generated(answer: Callable[..., Any], count: int = 1, timeout: float = 30.0) -> tuple[list[Outcome], int]:
    """Outcomes of generations in turn, and how many connections they took."""

    async def main() -> tuple[list[Outcome], int]:
        async with faked(answer) as fake:
            client = Client(Target(fake.url), timeout)
            found = [await client.generate("/v1/completions", b"{}") for _ in range(count)]
            client.close()
            return found, fake.connections

    return asyncio.run(main())


def test_a_connection_serves_one_request_after_the_other() -> None:
    found, connections = generated(three_words, 3)
    assert connections == 1
    for outcome in found:
        assert (outcome.error, outcome.prompt_tokens, outcome.output_tokens, len(outcome.times)) == ("", 7, 3, 3)
        assert outcome.start <= outcome.times[0] <= outcome.end


def test_a_connection_that_was_closed_while_it_was_kept_is_replaced() -> None:
    async def once(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
        await three_words(fake, body, writer)
        await writer.drain()
        writer.close()

    found, connections = generated(once, 3)
    assert [outcome.error for outcome in found] == [""] * 3 and connections == 3


async def _refuses(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(plain(429, {"error": {"message": "too much waits"}}, "Retry-After: 1\r\n"))


async def _closes_early(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(word("a")))
    await writer.drain()
    writer.close()


async def _closes_at_once(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _ends_without_done(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(word("a")) + b"0\r\n\r\n")


async def _sends_an_error(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(word("a") + event(error={"message": "a step failed"})) + b"0\r\n\r\n")


async def _sends_no_json(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(b'data: {"choices":[{"text":"a\n\n' + DONE) + b"0\r\n\r\n")


async def _sends_no_http(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello\r\n")


async def _stalls(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(word("a")))
    await writer.drain()
    await asyncio.sleep(30)


async def _answers_something_else(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(plain(200, {"choices": []}))


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (_refuses, "HTTP 429", "too much waits"),
        (_closes_early, "connection lost", "closed"),
        (_closes_at_once, "connection lost", "closed"),
        (_ends_without_done, "stream cut", "[DONE]"),
        (_sends_an_error, "error in the stream", "a step failed"),
        (_sends_no_json, "malformed event", "choices"),
        (_sends_no_http, "malformed response", "hello"),
        (_stalls, "timeout", "0.2 s"),
        (_answers_something_else, "malformed response", "choices"),
    ],
)
def test_what_a_server_does_wrong_is_an_error_of_its_kind(answer: Callable[..., Any], kind: str, said: str) -> None:
    [outcome], _ = generated(answer, timeout=0.2 if answer is _stalls else 30.0)
    assert outcome.error == kind and said in outcome.message


def test_a_server_that_is_not_there_is_an_error_too() -> None:
    outcome = asyncio.run(Client(Target("http://127.0.0.1:1")).generate("/v1/completions", b"{}"))
    assert outcome.error == "connection refused"


def test_a_whole_answer_has_counts_and_text() -> None:
    async def whole(fake: Any, body: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(plain(200, {"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}))

    [outcome], _ = generated(whole)
    assert (outcome.error, outcome.text, outcome.prompt_tokens, outcome.output_tokens) == ("", "abc", 2, 3)
    assert outcome.times == []


@pytest.mark.parametrize(
    "counts", [[], {"completion_tokens": "3"}, {"prompt_tokens_details": []}, {"prompt_tokens": -1}]
)
def test_counts_that_are_none_are_left_out(counts: Any) -> None:
    outcome = Outcome(0.0)
    outcome.count(counts)
    assert outcome.output_tokens is None and outcome.prompt_tokens is None and outcome.cached_tokens is None


def test_an_address_has_a_scheme_and_a_host() -> None:
    for url in (
        "127.0.0.1:8000",
        "ftp://x",
        "http://",
        "http://x:port",
        "http://[x",
        "http://x y",
        f"http://{'x' * 300}.org",
    ):
        with pytest.raises(UserError, match="--base-url"):
            Target(url)
    with pytest.raises(UserError, match="--api-key"):
        Target("http://x", "a\r\nb")
    target = Target("http://[::1]:80/proxy/", "key")
    assert (target.host, target.port, target.path) == ("::1", 80, "/proxy")
    head = target.head("POST", "/v1/completions", 3)
    assert head.startswith(b"POST /proxy/v1/completions HTTP/1.1\r\n") and b"Authorization: Bearer key\r\n" in head
