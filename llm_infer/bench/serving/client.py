"""A raw HTTP/1.1 client that costs few microseconds per token, so that it is the server that is measured."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llm_infer.base.errors import UserError
from llm_infer.bench.serving.events import Events, message_of
from llm_infer.bench.serving.response import MalformedResponse, Response


@dataclass(slots=True)
class Outcome:
    """What became of one request; times are in seconds, by `time.perf_counter`.

    Attributes:
        start: when it was sent; opening a connection is part of the time that follows.
        end: when its last byte came.
        times: when each event with text came; empty without streaming.
        prompt_tokens, output_tokens, cached_tokens: as the server counts them; None where it does not say.
        text: the answer, where it was asked for.
        error: kind of what went wrong, or "".
        message: its details.
    """

    start: float
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    text: str = ""
    error: str = ""
    message: str = ""

    def fail(self, kind: str, message: str = "") -> None:
        """Notes an error."""
        self.error, self.message = kind, " ".join(message.split())[:300]

    def count(self, usage: Any) -> None:
        """Takes the server's counts of tokens."""
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details")
            self.prompt_tokens = _number(usage.get("prompt_tokens"))
            self.output_tokens = _number(usage.get("completion_tokens"))
            self.cached_tokens = _number(details.get("cached_tokens")) if isinstance(details, dict) else None


class Target:
    """Where the server is.

    Attributes:
        url: its address, as typed.
        host, port, path: parts of it; the path comes before that of an endpoint.
        tls: context of https, or None.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Takes the address apart.

        Raises:
            UserError: it is no http:// or https:// address.
        """
        try:
            parts = urlsplit(url)
            port, host = parts.port, (parts.hostname or "").encode("idna")
        except ValueError:  # also of a host that no name can have
            parts, port, host = urlsplit(""), None, b""
        if parts.scheme not in ("http", "https") or not host or not (url.isascii() and url.isprintable()) or " " in url:
            raise UserError(f"--base-url {url}: expected an address such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.host = host.decode()
        self.port = port or (443 if parts.scheme == "https" else 80)
        self.path = parts.path.rstrip("/")
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        if any(each in (api_key or "") for each in "\r\n"):
            raise UserError("--api-key holds a line end")
        self._fields = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept: */*\r\n{key}"

    def head(self, method: str, path: str, size: int) -> bytes:
        """Returns the head of a request."""
        body = f"Content-Type: application/json\r\nContent-Length: {size}\r\n" if method == "POST" else ""
        return f"{method} {self.path}{path} HTTP/1.1\r\n{self._fields}{body}\r\n".encode()


class _Connection(asyncio.Protocol):
    """A connection that carries one request at a time."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.response: Response | None = None
        self.ended: asyncio.Future[None] | None = None
        self.lost = False
        self.received = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        response, ended = self.response, self.ended
        if response is None or ended is None or ended.done():
            self.transport.abort()  # nobody asked for this
            return
        self.received = True
        try:
            response.feed(data)
        except MalformedResponse as error:
            ended.set_exception(error)
        else:
            if response.complete:
                ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.response is not None and self.ended is not None and not self.ended.done():
            self.response.close()
            if self.response.complete:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(ConnectionError("the server closed the connection"))


class Client:
    """Sends requests over connections that it keeps open. For one event loop."""

    def __init__(self, target: Target, timeout: float = 3600.0) -> None:
        self.target = target
        self._timeout = timeout
        self._idle: list[_Connection] = []

    async def fetch(self, method: str, path: str, body: Any = None, *, timeout: float = 30.0) -> tuple[int, Any]:
        """Returns status and JSON body of a small request; a body that is no JSON is a text.

        Raises:
            OSError: the server cannot be reached, closes the connection, or takes too long.
            MalformedResponse: it does not speak HTTP/1.1.
        """
        data = b"" if body is None else json.dumps(body).encode()
        parts: list[bytes] = []
        async with asyncio.timeout(timeout):
            response = await self._send(method, path, data, lambda _: parts.append)
        try:
            return response.status, json.loads(b"".join(parts))
        except ValueError:
            return response.status, b"".join(parts).decode("utf-8", "replace")

    async def generate(self, path: str, body: bytes, *, keep_text: bool = False) -> Outcome:
        """Sends a generation and waits for its end. Errors are part of the outcome."""
        events, parts = Events(keep=keep_text), []
        streams = False

        def take(response: Response) -> Callable[[bytes], None]:
            nonlocal streams
            kind = response.headers.get("content-type", "")
            streams = response.status == 200 and kind.startswith("text/event-stream")
            return events.feed if streams else parts.append

        outcome = Outcome(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._send("POST", path, body, take)
            if response.status != 200:
                outcome.fail(f"HTTP {response.status}", _message(b"".join(parts)))
        except TimeoutError:
            outcome.fail("timeout", f"no complete answer after {self._timeout:g} s")
        except MalformedResponse as error:
            outcome.fail("malformed response", str(error))
        except OSError as error:
            kinds = {ConnectionRefusedError: "connection refused", ConnectionError: "connection lost"}
            kind = next((kind for each, kind in kinds.items() if isinstance(error, each)), "no connection")
            outcome.fail(kind, str(error))
        outcome.end = time.perf_counter()
        outcome.times = events.times
        if streams:
            events.end()
            if events.error:
                outcome.fail(*events.error)
            elif not (events.done or outcome.error):
                outcome.fail("stream cut", "the stream ended without [DONE]")
            outcome.count(events.usage)
            try:
                outcome.text = events.text()
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                outcome.fail("malformed event", str(error))
        elif not outcome.error:
            _read_whole(outcome, b"".join(parts))
        return outcome

    async def _send(
        self, method: str, path: str, body: bytes, take: Callable[[Response], Callable[[bytes], None]]
    ) -> Response:
        """Sends a request and returns its response when its body has ended; a kept connection that was closed is replaced."""
        data = self.target.head(method, path, len(body)) + body
        while True:
            connection = self._idle.pop() if self._idle else None
            if connection is not None and connection.lost:
                continue
            kept = connection is not None
            if connection is None:
                loop, target = asyncio.get_running_loop(), self.target
                _, connection = await loop.create_connection(_Connection, target.host, target.port, ssl=target.tls)
            response = connection.response = Response(take)
            connection.ended = asyncio.get_running_loop().create_future()
            connection.received = False
            connection.transport.write(data)
            try:
                await connection.ended
            except ConnectionError:
                if kept and not connection.received:
                    continue
                raise
            except BaseException:
                connection.transport.abort()
                raise
            if response.reusable and not connection.lost:
                connection.response = connection.ended = None
                self._idle.append(connection)
            else:
                connection.transport.close()
            return response

    def close(self) -> None:
        """Closes the connections that are kept."""
        for connection in self._idle:
            connection.transport.abort()
        self._idle.clear()


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _message(body: bytes) -> str:
    try:
        return message_of(json.loads(body))
    except (ValueError, RecursionError):
        return body[:300].decode("utf-8", "replace")


def _read_whole(outcome: Outcome, body: bytes) -> None:
    """Takes counts and text of an answer without streaming."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        outcome.text = (choice["message"].get("content") if "message" in choice else choice["text"]) or ""
        outcome.count(answer.get("usage"))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        outcome.fail("malformed response", f"expected choices, got {body[:200]!r}")
