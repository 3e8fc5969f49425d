"""Messages from the first process to the others, over TCP, sent while the devices compute, so that no step waits for them.

A message is a small JSON object and arrays of numbers. The others have nothing to say, so the end of a connection means that
a process is gone, which is noticed at once.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_infer.base.errors import UserError
from llm_infer.base.forks import is_lost_child

GRACE = 5.0
"""Seconds for which, after the loss of a process, a running step may report it; then this process ends."""


class Leader:
    """The first process's end of the connections.

    Args:
        num_followers: processes to wait for.
        settings: what all processes must agree on, by name.
    """

    def __init__(self, num_followers: int, settings: Mapping[str, str]) -> None:
        self.num_followers, self.settings = num_followers, dict(settings)
        self.token = secrets.token_bytes(16)
        self._listener = socket.create_server(("", 0))
        self._lock = threading.Lock()
        self._followers: dict[int, socket.socket] = {}
        self._lost: str | None = None
        self._noticed = threading.Event()
        self._closed = self._reported = False

    @property
    def port(self) -> int:
        """The port to which followers connect."""
        return self._listener.getsockname()[1]

    def accept(self, seconds: float) -> None:
        """Waits for all followers.

        Raises:
            UserError: one did not come, or was started with other settings; those that came are told.
        """
        self._listener.settimeout(seconds)
        problem = None
        while len(self._followers) < self.num_followers:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                missing = set(range(1, self.num_followers + 1)) - set(self._followers)
                raise UserError(f"process {min(missing)} did not connect within {seconds:.0f} s") from None
            connection.settimeout(seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_receive_exactly(connection, len(self.token)), self.token):
                connection.close()  # from a stranger
                continue
            hello, _ = _receive(connection)
            self._followers[hello["process"]] = connection
            problem = problem or self._difference(hello["process"], hello["settings"])
        for connection in self._followers.values():
            _send(connection, {"problem": problem})
            connection.settimeout(None)
        if problem is not None:
            raise UserError(problem)

    def _difference(self, process: int, theirs: Mapping[str, str]) -> str | None:
        for name in sorted(self.settings.keys() | theirs.keys()):
            here, there = self.settings.get(name), theirs.get(name)
            if here != there:
                return (
                    f"process {process} was started with {name}={there}, process 0 with {name}={here}: start all "
                    "processes with the same command"
                )
        return None

    def smallest(self, value: int) -> int:
        """Returns the smallest of all processes' values; every process calls this."""
        values = [_receive(connection)[0]["value"] for connection in self._followers.values()]
        result = min([value, *values])
        self.send({"value": result})
        return result

    def watch(self) -> None:
        """Notices the end of a follower from now on; `smallest` cannot be called any more."""
        for process, connection in self._followers.items():
            threading.Thread(target=self._watch, args=(process, connection), daemon=True).start()

    def send(self, header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Sends a message to every follower."""
        with self._lock:
            for connection in self._followers.values():
                _send(connection, header, arrays)

    def loss(self, seconds: float = 2.0) -> str | None:
        """Returns a message if the end of a process is noticed within `seconds`; the caller is then to report it."""
        self._reported = self._noticed.wait(seconds)
        return self._lost

    def out_of_step(self) -> None:
        """Gives up the others: they may have begun a step that this process has not, so nothing more can be computed together."""
        self._lost = self._lost or "a step that the other processes had begun was interrupted: restart all processes"
        self._noticed.set()
        for connection in self._followers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Lets the followers end; in a child of `os.fork`, which shares the connections, it does nothing."""
        if not self._closed and self._lost is None and not is_lost_child():
            self._closed = True
            self.send({"do": "stop"})

    def _watch(self, process: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)
        if self._closed:
            return
        self._lost = self._lost or f"process {process} of {self.num_followers + 1} is gone: restart all processes"
        self._noticed.set()
        time.sleep(GRACE)
        end_process(None if self._reported else self._lost)


class Follower:
    """Another process's end of the connection.

    Args:
        hosts: names or addresses under which the leader may be reached, tried in turn.
        port, token: those of the leader.
        process: number of this process.
        settings: as those of the leader.

    Raises:
        UserError: the leader cannot be reached, or was started with other settings.
    """

    def __init__(
        self, hosts: Sequence[str], port: int, token: bytes, process: int, settings: Mapping[str, str]
    ) -> None:
        self.process = process
        self._connection = _connect(hosts, port)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sendall(token)
        _send(self._connection, {"process": process, "settings": dict(settings)})
        answer, _ = _receive(self._connection)
        if answer["problem"] is not None:
            raise UserError(answer["problem"])
        # A thread of its own hears the leader's end, whatever this process is doing. A moment later JAX would end a
        # process that has lost its coordinator by aborting it.
        self._messages: queue.SimpleQueue[tuple[dict[str, Any], list[np.ndarray]]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="channel", daemon=True).start()

    def smallest(self, value: int) -> int:
        """Returns the smallest of all processes' values, see `Leader.smallest`."""
        _send(self._connection, {"value": value})
        return self.receive()[0]["value"]

    def receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Returns the next message. The process ends if the leader is gone."""
        return self._messages.get()

    def _listen(self) -> None:
        message: tuple[dict[str, Any], list[np.ndarray]] = {}, []
        while message[0].get("do") != "stop":
            try:
                message = _receive(self._connection)
            except OSError:
                end_process("process 0 is gone: restart all processes")
                return
            self._messages.put(message)


def _connect(hosts: Sequence[str], port: int) -> socket.socket:
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=10)
        except OSError:
            continue
        connection.settimeout(None)
        return connection
    raise UserError(f"process 0 cannot be reached at {', '.join(hosts)}, port {port}: open the ports between the hosts")


def _send(connection: socket.socket, header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    described = {**header, "arrays": [(array.dtype.str, array.shape) for array in arrays]}
    text = json.dumps(described).encode()
    connection.sendall(struct.pack("<I", len(text)) + text)
    for array in arrays:
        connection.sendall(np.ascontiguousarray(array).data.cast("B"))


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[np.ndarray]]:
    (size,) = struct.unpack("<I", _receive_exactly(connection, 4))
    header = json.loads(_receive_exactly(connection, size))
    arrays = []
    for dtype, shape in header.pop("arrays"):
        array = np.empty(shape, np.dtype(dtype))
        array.data.cast("B")[:] = _receive_exactly(connection, array.nbytes)
        arrays.append(array)
    return header, arrays


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise ConnectionError("the other process has closed the connection")
        parts += part
    return bytes(parts)


def end_process(message: str | None) -> None:
    """Ends this process without waiting for the others, as JAX would do at its exit."""
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
