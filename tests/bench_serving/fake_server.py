"""A small server that answers as it is told to, on the loop of the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any


def event(**fields: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def word(text: str, chat: bool = False) -> bytes:
    """An event with a text."""
    return event(choices=[{"delta": {"content": text}} if chat else {"text": text, "index": 0}], usage=None)


def usage(prompt: int, output: int) -> bytes:
    """An event with counts."""
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output})


DONE = b"data: [DONE]\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """A chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def plain(status: int, body: Any, headers: str = "") -> bytes:
    """A whole response with a JSON body."""
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


class FakeServer:
    """Answers generations by a function of the test.

    Attributes:
        url: where it is.
        bodies, heads: of the generations it was asked for, in order.
        connections: how many it had.
        not_ready: how often it says so before it is ready.
        tokens: what its tokenizer gives for any text; None where it has none.
        running, most: generations that run now, and most of them at once.
    """

    def __init__(self, answer: Callable[[FakeServer, dict[str, Any], asyncio.StreamWriter], Any]) -> None:
        self.answer = answer
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.connections = 0
        self.not_ready = 0
        self.tokens: list[int] | None = None
        self.running = self.most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads requests of one connection and answers them."""
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0
                )
                body = json.loads(await reader.readexactly(length) or b"{}")
                if head.startswith(b"GET /health "):
                    self.not_ready -= 1
                    writer.write(plain(503 if self.not_ready >= 0 else 404, {"status": "compiling"}))
                elif head.startswith(b"GET /v1/models "):
                    writer.write(plain(200, {"data": [{"id": "fake"}, {"id": "other"}]}))
                elif head.startswith(b"POST /tokenize "):
                    writer.write(
                        plain(404, {"detail": "Not Found"})
                        if self.tokens is None
                        else plain(200, {"tokens": self.tokens})
                    )
                else:
                    self.bodies.append(body)
                    self.heads.append(head)
                    self.running += 1
                    self.most = max(self.most, self.running)
                    try:
                        await self.answer(self, body, writer)
                    finally:
                        self.running -= 1
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def faked(answer: Callable[[FakeServer, dict[str, Any], asyncio.StreamWriter], Any]) -> AsyncIterator[FakeServer]:
    """A server that runs inside the `async with` block."""
    fake = FakeServer(answer)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()


async def three_words(fake: FakeServer, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Streams three words, one chunk each."""
    chat = "messages" in body
    writer.write(STREAM_HEAD)
    for text in ("a", " b", " c"):
        writer.write(chunk(word(text, chat)))
    writer.write(chunk(usage(7, 3)) + chunk(DONE) + b"0\r\n\r\n")
