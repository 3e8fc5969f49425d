"""`llm-infer serve` as a process: it says where it is, ends at signals with status 0, and fails with one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.server.conftest import CHATML

SMALL = ["--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--num-pages", "32"]


class Process:
    """A server of its own; `lines` are what it wrote to standard error."""

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "llm_infer", "serve", "--model", str(model), "--port", "0", *SMALL, *flags]
        env = {**os.environ, "LLM_INFER_CONFIG": ""}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def url(self) -> str:
        """Where it is, once it is ready."""
        for _ in range(1200):
            for line in self.lines:
                if found := re.match(r"serving \S+ at (\S+) ", line):
                    return found[1]
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)
        raise AssertionError(self.lines)

    def end(self, *, seconds: float = 60) -> int:
        """Its exit status."""
        status = self.process.wait(seconds)
        self._reader.join(5)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return status


@pytest.fixture
def start(tiny_gguf: Path) -> Iterator[object]:
    made: list[Process] = []

    def started(*flags: str, model: Path = tiny_gguf) -> Process:
        made.append(Process(model, *flags))
        return made[-1]

    yield started
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.end()


def test_a_signal_drains_and_a_second_one_ends(start, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    server = start("--chat-template", str(template), "--warm-up", "none", "--served-model-name", "mine")
    url = server.url()
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json={**body, "ignore_eos": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and any('"length"' in line for line in rest)
    assert server.end() == 0
    port = int(url.rsplit(":", 1)[1])
    with socket.socket() as again:  # the port can be had at once
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_who_takes_too_long_gets_an_error(start, how: str) -> None:
    server = start("--warm-up", "none", "--shutdown-timeout", "0.2" if how == "timeout" else "60")
    body = {"prompt": ["Hi"] * 400, "max_tokens": 100, "stream": True, "ignore_eos": True}
    url = server.url()
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            with httpx.Client(base_url=url) as other:
                while other.get("/health").json()["status"] != "draining":
                    time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["message"] == "the server stops"
    assert server.end() == 0


def test_a_server_that_is_loading_ends_at_ctrl_c(start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start("--port", str(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                answer = client.get("/health")
                break
            time.sleep(0.05)
    assert answer.status_code == 503 and answer.json()["status"] in ("loading", "compiling")
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 0, server.lines
    assert not [line for line in server.lines if "Traceback" in line], server.lines


def test_a_socket_of_unix_is_removed_again(start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = start("--uds", str(path), "--warm-up", "none")
    assert server.url() == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
        assert client.get("/health").json()["status"] == "ready"
    second = start("--uds", str(path), "--warm-up", "none")
    assert second.end() == 1 and second.lines[-1].startswith(f"error: cannot listen at {path}: ")
    assert path.exists()
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 0 and not path.exists()


def test_what_is_wrong_is_one_line(start, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = start("--port", str(taken.getsockname()[1]))
        assert server.end() == 1
        assert server.lines[-1].startswith("error: cannot listen at 127.0.0.1:") and "--port" in server.lines[-1]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    server = start(model=broken)
    assert server.end() == 1
    assert server.lines[-1].startswith("error: ") and not [line for line in server.lines if "Traceback" in line]
