"""Renders chat templates in processes of their own under hard limits: no template can hang this process or fill its memory.

Processes start when they are first needed (about 0.1 s), stay for later requests (well under 1 ms each), and are
replaced when a limit or a crash has ended them. They hold no model and import neither JAX nor this package.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_infer.base.errors import RequestError

_HEADER = 8  # as in template_sandbox, which is not imported here: it would load Jinja
_LONGEST_ANSWER = 1 << 27  # bytes
_PASSED_ON = ("TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # a template needs no other variable
_START = "import sys; sys.path += sys.argv[3:]; from template_sandbox import serve; serve(float(sys.argv[1]), int(sys.argv[2]))"


class StoppedError(RequestError):
    """A rendering that did not finish: a limit or a crash ended its process, or no process could be had."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Most that one rendering may take.

    Attributes:
        cpu_seconds: processor time.
        wall_seconds: time until the process is killed in any case; reached only on a machine that is overloaded.
        memory: bytes of address space, or of resident memory where the system cannot bound the former.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 60.0
    memory: int = 1 << 30


class TemplateProcess:
    """One process, for one thread at a time; after any exception it must be closed."""

    def __init__(self, limits: Limits, *, watch_memory: bool = sys.platform == "darwin") -> None:
        """Starts the process; `watch_memory`: watch its memory from outside, where the system does not keep its limit."""
        self._limits = limits
        self._watch_memory = watch_memory
        self._socket, theirs = socket.socketpair()
        with theirs:
            # With -I and -S nothing from the environment, the working directory or site-packages runs there. It has a session of
            # its own, since Ctrl-C on the terminal is for this process alone.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    _START,
                    str(limits.cpu_seconds),
                    str(limits.memory),
                    *_import_paths(),
                ],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, request: bytes) -> list[str]:
        """Returns the process's answer to a request, see `template_sandbox.serve`.

        Raises:
            StoppedError: the process ended before it answered, or had to be ended.
        """
        deadline = time.monotonic() + self._limits.wall_seconds
        try:
            self._socket.settimeout(self._limits.wall_seconds)
            self._socket.sendall(len(request).to_bytes(_HEADER, "big") + request)
            size = int.from_bytes(self._receive(_HEADER, deadline), "big")
            if size > _LONGEST_ANSWER:
                raise StoppedError(f"the chat template was stopped: its answer has {size} bytes")
            return json.loads(self._receive(size, deadline))
        except TimeoutError:
            raise StoppedError(
                f"the chat template was stopped: no answer within {self._limits.wall_seconds:g} s"
            ) from None
        except (EOFError, OSError):
            raise StoppedError(f"the chat template was stopped: {self._cause_of_end()}") from None

    def close(self) -> None:
        """Ends the process, whatever it is doing, and leaves no zombie."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Lets go of a process that belongs to the parent of this one."""
        self._socket.close()
        self._process.returncode = 0  # it is no child of ours: nothing to wait for or to warn of

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            left = deadline - time.monotonic()
            self._socket.settimeout(max(0.001, min(left, 0.05) if self._watch_memory else left))
            try:
                piece = self._socket.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise
                self._check_memory()
                continue
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _check_memory(self) -> None:
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=False)
        if shown.stdout.strip().isdigit() and int(shown.stdout) << 10 > self._limits.memory:
            raise StoppedError(
                f"the chat template was stopped: it takes more than {self._limits.memory >> 20} MiB of memory"
            )

    def _cause_of_end(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the connection to its process broke"
        if code == -signal.SIGPROF:
            return f"it takes more than {self._limits.cpu_seconds:g} s of processor time"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with status {code} (does `{sys.executable} -I` run and import jinja2?)"


class TemplateProcesses:
    """Several processes, so that one slow template does not hold up the others; for any number of threads."""

    def __init__(self, count: int, limits: Limits) -> None:
        """Allows at most `count` processes; none starts yet."""
        self._count, self._limits = count, limits
        self._idle: list[TemplateProcess] = []
        self._free = threading.BoundedSemaphore(count)

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Returns the text that a template makes of these variables, which must be plain values (those of JSON).

        Raises:
            RequestError: the template fails, refuses the variables or, as a StoppedError, takes more than the limits.
        """
        try:
            request = json.dumps([template, variables], default=_plain).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the chat template takes plain values, as JSON has them: {error}") from None
        with self._free:
            process = self._take()
            try:
                kind, text = process.ask(request)
            except BaseException:  # Ctrl-C too: an answer that nobody waits for must not pass for the next one's
                process.close()
                raise
            if kind == "spent":
                process.close()
                raise StoppedError(text)
            self._idle.append(process)
        if kind == "error":
            raise RequestError(text)
        return text

    def close(self) -> None:
        """Ends the processes that are waiting for work."""
        while self._idle:
            self._idle.pop().close()

    def after_fork(self) -> None:
        """Starts afresh in a forked child: the processes, and the threads that held the semaphore, are the parent's."""
        for process in self._idle:
            process.forget()
        self._idle.clear()
        self._free = threading.BoundedSemaphore(self._count)

    def _take(self) -> TemplateProcess:
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                break
            if process.alive:
                return process
            process.close()  # something outside has ended it
        try:
            return TemplateProcess(self._limits)
        except OSError as error:
            raise StoppedError(f"cannot start a process that renders the chat template: {error}") from None


def _import_paths() -> list[str]:
    """Returns the directories in which `template_sandbox` and its imports lie."""
    found = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found.append(str(Path(spec.origin).parent.parent))
    return [*dict.fromkeys(found), str(Path(__file__).parent)]


def _plain(value: Any) -> Any:
    """Returns mappings and arrays in forms that JSON knows."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"found a {type(value).__name__}")


PROCESSES = TemplateProcesses(min(4, os.cpu_count() or 1), Limits())
"""The processes that render all templates of this process."""

atexit.register(PROCESSES.close)
with suppress(AttributeError):  # systems without fork
    os.register_at_fork(after_in_child=PROCESSES.after_fork)
