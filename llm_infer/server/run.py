"""Runs the application in uvicorn: limits of connections, a drain at the first signal and an end at the second."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llm_infer.base.errors import UserError
from llm_infer.options import EngineOptions
from llm_infer.server import logs
from llm_infer.server.app import make_app
from llm_infer.server.gate import MAX_HEADER_BYTES, MAX_HEADERS
from llm_infer.server.options import ServerOptions
from llm_infer.server.service import Service

HEADER_SECONDS = 10.0
"""Seconds in which the first request of a connection must have begun with all its headers."""


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 that gives up whoever sends no request, headers without end or too many of them."""

    _header_bytes = _num_headers = 0
    _waiting: asyncio.TimerHandle | None = None
    _cycles: list[RequestResponseCycle]

    def connection_made(self, transport: Any) -> None:
        """Starts to wait for the first request."""
        super().connection_made(transport)
        self._cycles = []
        self._waiting = self.loop.call_later(HEADER_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells all requests of the connection; uvicorn tells the one that came last, which may wait behind others."""
        self._stop_waiting()
        super().connection_lost(exc)
        self.pipeline.clear()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def on_message_begin(self) -> None:
        """Counts headers anew."""
        self._header_bytes = self._num_headers = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Counts the path."""
        self._count(len(url), 0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts a header."""
        self._count(len(name) + len(value), 1)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Lets the request begin."""
        self._stop_waiting()
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        if self.cycle is not None:
            self._cycles.append(self.cycle)

    def _count(self, size: int, number: int) -> None:
        self._header_bytes += size
        self._num_headers += number
        # Somewhat more than the application refuses with a status of its own.
        if self._header_bytes > 2 * MAX_HEADER_BYTES or self._num_headers > 2 * MAX_HEADERS:
            self.transport.abort()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Server(uvicorn.Server):
    """uvicorn's server with an end of our own: at the first signal requests may end, at the second all is over."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal; called by Python in the main thread."""
        self._on_signal()


def serve(engine_options: EngineOptions, options: ServerOptions) -> int:
    """Serves until a signal comes or the engine ends; returns the exit status of the process.

    Raises:
        UserError: the model cannot be loaded, or the address cannot be had.
    """
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_serve(engine_options, options))


async def _serve(engine_options: EngineOptions, options: ServerOptions) -> int:
    logs.set_up(options.log_format, requests=options.log_requests)
    listening = _socket(options)
    own = None if options.uds is None else os.stat(options.uds)
    service = Service(engine_options, options)
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        service.drain()
        if signals == 1 and service.num_active:
            limit = f"{options.shutdown_timeout:g} s to end"
            print(f"stopping: {service.num_active} running have {limit}; again stops at once", file=sys.stderr)
        if signals > 1:
            server.force_exit = True
        stop.set()

    config = uvicorn.Config(
        make_app(service),  # type: ignore[arg-type]
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=round(options.keep_alive),
        timeout_graceful_shutdown=5,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    stop = asyncio.Event()
    server = Server(config, on_signal)
    try:
        config.load()
    except OSError as error:
        raise UserError(f"--ssl-certfile {options.ssl_certfile}: {error.strerror or error}") from None
    service.begin()
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    said = asyncio.ensure_future(_say_when_ready(service, options, listening))
    status = 0
    try:
        stopping, ended = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(service.ended.wait())
        await asyncio.wait((stopping, ended, serving), return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not stop.is_set():
            if not hasattr(service, "engine"):  # it could not be loaded
                server.should_exit = True
                await serving
                assert service.error is not None
                raise service.error
            print(f"error: {service.failure}", file=sys.stderr)
            status = 1
            if not options.exit_on_engine_death:
                await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        await _drained(service, options, server)
    finally:
        said.cancel()
        await service.close()  # what still runs gets an error, and its answer ends
        server.should_exit = True
        await serving
        if options.uds is not None and own is not None:
            _remove_own(options.uds, listening, own)
    if service.is_loading:  # the end of the process would wait for its compilers
        sys.stderr.flush()
        os._exit(status)
    return status


async def _say_when_ready(service: Service, options: ServerOptions, listening: socket.socket) -> None:
    while service.state in ("loading", "compiling"):
        await asyncio.sleep(0.02)
    if service.state != "ready":
        return
    gc.collect()
    gc.freeze()  # what lives for ever need not be looked at again and again
    scheme = "http" if options.ssl_certfile is None else "https"
    where = f"unix:{options.uds}" if options.uds is not None else f"{scheme}://{_shown_address(listening)}"
    print(f"serving {service.names[0]} at {where} (Ctrl-C stops)", file=sys.stderr, flush=True)
    engine = service.session.engine
    size = engine.config.cache.page_size
    tools = "none" if service.formats.tools is None else service.formats.tools.name
    limits = f"{engine.max_model_len} tokens of context, {engine.config.scheduler.max_num_seqs} sequences at once"
    print(
        f"{limits}, {engine.runner.num_pages} pages of {size} tokens; form of tool calls: {tools}",
        file=sys.stderr,
        flush=True,
    )
    if not (options.on_loopback or options.api_keys or options.uds):
        print("note: whoever reaches this machine may ask; --api-key KEY asks for a key", file=sys.stderr, flush=True)


async def _drained(service: Service, options: ServerOptions, server: Server) -> None:
    """Waits until nothing runs, at most as long as the options say; a second signal ends it."""
    limit = asyncio.get_running_loop().time() + options.shutdown_timeout
    while service.num_active and not server.force_exit and asyncio.get_running_loop().time() < limit:
        await asyncio.sleep(0.02)


def _socket(options: ServerOptions) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        if options.uds is not None:
            _remove_dead(options.uds)
            made = socket.socket(socket.AF_UNIX)
            made.bind(options.uds)
            os.chmod(options.uds, 0o660)
        else:
            family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
            made = socket.socket(family)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        made.listen(2048)
        made.setblocking(False)
        return made
    except OSError as error:
        where = options.uds if options.uds is not None else f"{options.host}:{options.port}"
        flag = "--uds" if options.uds is not None else "--host or --port"
        raise UserError(f"cannot listen at {where}: {error.strerror or error}; choose another with {flag}") from None


def _remove_dead(path: str) -> None:
    """Removes the socket that a server before has left; one that somebody answers at stays, and so does any other file."""
    with suppress(OSError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as other:
            try:
                other.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def _remove_own(path: str, listening: socket.socket, made: os.stat_result) -> None:
    """Removes our socket, unless it is another's by now."""
    listening.close()
    with suppress(OSError):
        if os.path.samestat(os.stat(path), made):
            os.unlink(path)


def _shown_address(listening: socket.socket) -> str:
    host, port, *_ = listening.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
