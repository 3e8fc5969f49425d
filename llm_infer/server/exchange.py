"""One request and its answer over ASGI: reads the body within limits, notices who leaves, writes JSON or a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError

from llm_infer.server import fields, logs
from llm_infer.server.errors import MAX_VALIDATION_ERRORS, ApiError, bad_request
from llm_infer.server.options import OPEN
from llm_infer.server.protocol import Body
from llm_infer.server.service import Service, Ticket

B = TypeVar("B", bound=Body)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

log = logging.getLogger(logs.LOGGER)

LARGE_BODY = 1 << 16
"""Bytes from which on a body is parsed by a worker thread."""

QUIET = OPEN | {"/metrics"}
"""Routes that are asked all the time by programs that watch: nothing is written about them."""

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The end of a connection before its answer."""


class Exchange:
    """A request and its answer.

    Attributes:
        request_id: the client's, or one of ours; in the answer's header.
        salt: what separates cached prefixes of clients with different keys.
        code: of the error that it ended with.
        ticket: what a stream waits for.
        facts: what a trace tells of the request, by OpenTelemetry's names.
        started: the status has been sent, so an error can only be an event.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, service: Service) -> None:
        self.scope, self.service = scope, service
        self._receive, self._send = receive, send
        state = scope.get("llm_infer", {})
        self.request_id: str = state.get("request_id", "-")
        self.salt: str | None = state.get("salt")
        self.headers: dict[str, str] = {}
        self.started = False
        self.status = 0
        self.code: str | None = None
        self.ticket: Ticket | None = None
        self._writing_since: float | None = None
        self.facts: dict[str, Any] = {}

    async def read(self) -> bytes:
        """Returns the whole body.

        Raises:
            ApiError: it is too large, too slow, compressed, or not JSON by its own word.
            ClientGoneError: the client left.
        """
        headers = {name: value for name, value in self.scope["headers"] if name.startswith(b"content-")}
        kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            raise ApiError(415, "expected a body of content-type application/json", code="unsupported_media_type")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise ApiError(415, "expected a body without content-encoding", code="unsupported_media_type")
        limit = self.service.options.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.service.options.body_timeout):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", code="timeout") from None

    async def parsed(self, kind: type[B], body: bytes) -> B:
        """Returns the body as one of the models of `protocol.py`.

        Raises:
            ApiError: it is no JSON, a field is wrong, or the server does not serve its model.
        """
        try:
            if len(body) > LARGE_BODY:
                found = await asyncio.get_running_loop().run_in_executor(None, kind.model_validate_json, body)
            else:
                found = kind.model_validate_json(body)
        except ValidationError as error:
            raise _explained(error) from None
        unknown = fields.check(found, strict=self.service.options.strict_fields)
        if unknown:
            self.headers["x-llm-infer-ignored"] = fields.names(unknown)
        if found.model is not None and found.model not in self.service.names:
            raise ApiError(
                404,
                f"the model {found.model[:100]!a} is not served here: expected {self.service.names[0]!a} (see /v1/models)",
                param="model",
                code="model_not_found",
            )
        return found

    async def gone(self) -> None:
        """Returns when the client has left; to be called once the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Sends a whole answer: JSON, or bytes as they are."""
        if isinstance(content, bytes):
            body, kind = content, "text/plain; charset=utf-8"
        else:
            body = encoded(content)
            kind = "application/json"
        shown = {"content-type": kind, "content-length": str(len(body)), **self.headers, **(headers or {})}
        await self._begin(status, shown)
        await self._write(b"" if self.scope["method"] == "HEAD" else body)

    async def begin_stream(self) -> None:
        """Sends the status and the headers of a stream of events."""
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        await self._begin(200, {**headers, **self.headers})

    async def frames(self, data: bytes) -> None:
        """Sends events."""
        self._writing_since = time.monotonic()  # and no timer for each: `tick` looks at it
        await self._sent({"type": "http.response.body", "body": data, "more_body": True})
        self._writing_since = None

    async def end_stream(self, data: bytes = DONE) -> None:
        """Sends the last events."""
        await self._write(data)

    def tick(self) -> bool:
        """Does what time asks for, at most a second late; False says that the reader of a stream has stalled for too long."""
        options, now = self.service.options, time.monotonic()
        if self.ticket is not None and now - self.ticket.last_news > options.sse_keep_alive:
            self.ticket.nudge()
        return self._writing_since is None or now - self._writing_since < options.stall_timeout

    async def fail(self, error: ApiError) -> None:
        """Sends an error: as the answer, or as an event where the answer has begun."""
        self.code = error.code or "error"
        if self.started:
            await self.end_stream(event(error.body()))
        else:
            await self.reply(error.body(), error.status, error.headers)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.started, self.status = True, status
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._sent({"type": "http.response.start", "status": status, "headers": pairs})

    async def _write(self, data: bytes) -> None:
        """Hands the last bytes to the connection; whoever takes none for too long is given up.

        Raises:
            ClientGoneError: the reader stalls.
        """
        try:
            async with asyncio.timeout(self.service.options.stall_timeout):
                await self._sent({"type": "http.response.body", "body": data, "more_body": False})
        except TimeoutError:
            raise ClientGoneError from None

    async def _sent(self, message: MutableMapping[str, Any]) -> None:
        try:
            await self._send(message)
        except OSError:
            raise ClientGoneError from None
        except RuntimeError as error:  # uvloop's word for a connection that was closed between two events
            if "closed" in str(error):
                raise ClientGoneError from None
            raise


def event(content: Any) -> bytes:
    """Returns a server-sent event of JSON."""
    return b"data: " + encoded(content) + b"\n\n"


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def encoded(content: Any) -> bytes:
    """Returns JSON in UTF-8."""
    return _encode(content).encode("utf-8", "replace")


Handler = Callable[[Exchange, bytes], Awaitable[None]]


class Endpoint:
    """An ASGI application of one route: has a handler answer, watches the connection meanwhile, and makes errors answers.

    Args:
        handler: gets the exchange and the body.
        service: what all routes share.
        name: for metrics and logs.
    """

    def __init__(self, handler: Handler, service: Service, name: str) -> None:
        self._handler, self._service, self.name = handler, service, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        exchange, began = Exchange(scope, receive, send, self._service), time.monotonic()
        self._service.num_active += 1
        try:
            try:
                body = await exchange.read() if scope["method"] == "POST" else b""
                await self._watched(exchange, body)
            except ApiError as error:
                await exchange.fail(error)
            except (ClientGoneError, asyncio.CancelledError):
                raise
            except Exception as error:
                log.error(
                    "request %s: %s",
                    ascii(exchange.request_id),
                    ascii(f"{type(error).__name__}: {error}"),
                    exc_info=True,
                )
                await exchange.fail(ApiError(500, "the server failed at this request", code="internal_error"))
        except ClientGoneError:
            exchange.status = exchange.status or 499
        finally:
            self._service.num_active -= 1
            status = exchange.status or 499
            self._service.metrics.answered(self.name, status)
            if self.name not in QUIET:
                seconds = time.monotonic() - began
                if exchange.facts:
                    sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
                    self._service.tracing.ended(self.name, sent, exchange.facts, status, seconds)
                counts = [exchange.facts.get(f"gen_ai.usage.{kind}_tokens", 0) for kind in ("input", "output")]
                logs.request_ended(
                    log,
                    id=exchange.request_id,
                    method=scope["method"],
                    route=self.name,
                    status=status,
                    seconds=seconds,
                    code=exchange.code,
                    tokens=(counts[0], counts[1]) if exchange.facts else None,
                )

    async def _watched(self, exchange: Exchange, body: bytes) -> None:
        """Runs the handler; ends it when the client leaves."""
        options = self._service.options
        limit = options.request_timeout
        end = math.inf if limit is None else time.monotonic() + limit
        interval = min(1.0, options.stall_timeout, options.sse_keep_alive)
        work = asyncio.ensure_future(self._handler(exchange, body))
        watch = asyncio.ensure_future(exchange.gone())
        try:
            stalls = False
            while not (work.done() or watch.done() or stalls or time.monotonic() >= end):
                wait = min(interval, end - time.monotonic())
                await asyncio.wait((work, watch), timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                stalls = not exchange.tick()
            if work.done():
                work.result()
                return
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            if watch.done() or stalls:
                raise ClientGoneError
            raise ApiError(504, f"the request took longer than {limit} s", code="timeout")
        finally:
            for task in (work, watch):
                task.cancel()


def _explained(error: ValidationError) -> ApiError:
    """Returns an error of status 400 that names fields and what was expected, but not what they held."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    parts = []
    for one in found[:MAX_VALIDATION_ERRORS]:
        where = ".".join(ascii(part)[:64].strip("'") for part in one["loc"][:8])
        parts.append(f"{where}: {one['msg'][:200]}" if where else one["msg"][:200])
    if len(found) > MAX_VALIDATION_ERRORS:
        parts.append(f"and {len(found) - MAX_VALIDATION_ERRORS} more")
    param = str(found[0]["loc"][0])[:64] if found and found[0]["loc"] else None
    return bad_request("; ".join(parts).encode("ascii", "replace").decode(), param, "invalid_body")
