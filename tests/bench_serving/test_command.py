"""`llm-infer bench serving` as users run it, against the fake server."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_infer.commands import app
from tests.bench_serving.fake_server import STREAM_HEAD, FakeServer, faked, plain, three_words

SMALL = ("--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "3")


@contextmanager
def running(answer: Any = three_words, tokens: list[int] | None = None) -> Iterator[FakeServer]:
    """A fake server on a thread of its own."""
    ready, stop, found = threading.Event(), asyncio.Event(), []

    async def main() -> None:
        async with faked(answer) as fake:
            fake.tokens = tokens
            found.extend([fake, asyncio.get_running_loop()])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield found[0]
    finally:
        found[1].call_soon_threadsafe(stop.set)
        thread.join(10)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the command."""
    monkeypatch.setattr(sys, "argv", ["llm-infer", "bench", "serving", *flags])
    with pytest.raises(SystemExit) as ended:
        app.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


Capsys = pytest.CaptureFixture[str]


def test_a_load_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    file = tmp_path / "figures.json"
    with running(tokens=[5, 6, 7, 8]) as fake:
        flags = ("--base-url", fake.url, *SMALL, "--ignore-eos", "--extra-body", '{"top_k": 5}', "--num-warmups", "2")
        flags = (*flags, "--goodput", "ttft:9000 tpot:9000", "--max-concurrency", "2", "--json", str(file))
        code, out, err = run(monkeypatch, capsys, *flags)
    assert (code, err) == (0, "")
    assert "output throughput" in out and "Time to first token" in out
    found = json.loads(file.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (6, 0, 18)
    assert found["input_lens"] == [7] * 6 and found["model_id"] == "fake"
    assert found["request_goodput"] == found["request_throughput"]
    assert len(fake.bodies) == 8 and fake.most <= 2 and fake.connections <= 4
    for body in fake.bodies:
        assert body["model"] == "fake" and body["max_tokens"] == 3 and body["temperature"] == 0
        assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
        assert body["ignore_eos"] is True and body["top_k"] == 5
        assert len(body["prompt"]) == 5 and set(body["prompt"]) <= {5, 6, 7, 8}


def test_chats_and_servers_without_a_tokenizer_get_words(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    with running() as fake:
        assert run(monkeypatch, capsys, "--base-url", fake.url, *SMALL)[0] == 0
        assert all(len(body["prompt"].split()) == 5 for body in fake.bodies)
        fake.bodies.clear()
        assert run(monkeypatch, capsys, "--base-url", fake.url, *SMALL, "--backend", "openai-chat")[0] == 0
    for body in fake.bodies:
        [message] = body["messages"]
        assert message["role"] == "user" and len(message["content"].split()) == 5


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_a_later_turn_carries_what_was_said(backend: str, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    with running() as fake:
        flags = ("--base-url", fake.url, *SMALL, "--num-prompts", "1", "--max-turns", "3", "--backend", backend)
        assert run(monkeypatch, capsys, *flags)[0] == 0
    first, second, third = fake.bodies
    if backend == "openai":
        assert second["prompt"].startswith(first["prompt"] + "a b c\n")
        assert third["prompt"].startswith(second["prompt"] + "a b c\n")
    else:
        assert second["messages"][:2] == [*first["messages"], {"role": "assistant", "content": "a b c"}]
        assert third["messages"][:3] == second["messages"] and len(third["messages"]) == 5


def test_errors_are_counted_and_shown_and_end_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    async def sometimes(fake: FakeServer, body: Any, writer: asyncio.StreamWriter) -> None:
        if len(fake.bodies) % 3 == 1:
            writer.write(plain(429, {"error": {"message": "too much waits"}}))
        elif len(fake.bodies) % 3 == 2:
            writer.write(STREAM_HEAD)
            await writer.drain()
            writer.close()
        else:
            await three_words(fake, body, writer)

    with running(sometimes) as fake:
        code, out, _ = run(monkeypatch, capsys, "--base-url", fake.url, *SMALL, "--max-concurrency", "1")
    assert code == 0 and "2 × HTTP 429, such as: too much waits" in out and "2 × connection lost" in out


def test_no_answer_at_all_is_an_error_after_the_report(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    async def refuses(fake: FakeServer, body: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(plain(400, {"error": {"message": "no such field"}}))

    with running(refuses) as fake:
        code, out, err = run(monkeypatch, capsys, "--base-url", fake.url, *SMALL)
    assert (
        code == 1
        and "6 × HTTP 400" in out
        and err.startswith("error: no request succeeded; the first ended with HTTP 400")
    )


def test_a_server_without_the_model_says_which_it_has(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    with running() as fake:
        code, _, err = run(monkeypatch, capsys, "--base-url", fake.url, "--model", "another")
    assert code == 1 and err == f"error: --model another: the server at {fake.url} has fake, other\n"


def test_a_key_is_sent_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setenv("LLM_INFER_API_KEY", "s3cret")
    reports = [tmp_path / "x.json", tmp_path / "x.html"]
    with running() as fake:
        flags = ("--base-url", fake.url, *SMALL, "--json", str(reports[0]), "--html", str(reports[1]))
        code, out, err = run(monkeypatch, capsys, *flags)
    assert code == 0 and all(b"Authorization: Bearer s3cret\r\n" in head for head in fake.heads)
    assert not any("s3cret" in text for text in (out, err, *(file.read_text() for file in reports)))


def test_a_server_that_is_not_ready_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    with running() as fake:
        fake.not_ready = 2
        code, _, err = run(monkeypatch, capsys, "--base-url", fake.url, *SMALL)
        assert code == 1 and "answers 503 to GET /health: compiling" in err and "--ready-check-timeout-sec" in err
        assert run(monkeypatch, capsys, "--base-url", fake.url, *SMALL, "--ready-check-timeout-sec", "60")[0] == 0
    assert fake.not_ready < 0 and len(fake.bodies) == 6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--base-url", "http://127.0.0.1:1"), "--ready-check-timeout-sec"),
        (("--base-url", "x"), "--base-url x: expected an address"),
        (("--backend", "vllm"), "--backend vllm: expected openai or openai-chat"),
        (("--dataset-name", "sonnet"), "--dataset-name sonnet: expected random"),
        (("--dataset-name", "sharegpt"), "--dataset-path FILE"),
        (("--request-rate", "0"), "--request-rate 0: expected a number above 0"),
        (("--request-rate", "nan"), "--request-rate nan"),
        (("--burstiness", "-1"), "--burstiness -1: expected a number above 0"),
        (("--trace-scale", "inf"), "--trace-scale inf: expected a finite number"),
        (("--random-range-ratio", "2"), "--random-range-ratio 2"),
        (("--ramp-up-strategy", "steep"), "--ramp-up-strategy steep: expected linear or exponential"),
        (("--ramp-up-strategy", "linear"), "--ramp-up-start-rps"),
        (("--endpoint", "/v1 HTTP/1.1"), "--endpoint /v1 HTTP/1.1: expected a path"),
        (("--goodput", "ttft"), "--goodput ttft: expected"),
        (("--goodput", "itl:5"), "--goodput itl:5: expected"),
        (("--percentile-metrics", "ttft,x"), "--percentile-metrics x: expected"),
        (("--metric-percentiles", "50,101"), "--metric-percentiles 50,101"),
        (("--extra-body", "[1]"), "--extra-body [1]: expected a JSON object"),
        (("--extra-body", "{"), "--extra-body: not valid JSON"),
        (("--html", "/nowhere/x.html"), "--html /nowhere/x.html cannot be written"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    flags: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    code, _, err = run(monkeypatch, capsys, *flags)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_ctrl_c_reports_what_is_done(tmp_path: Path) -> None:
    async def fourth_stalls(fake: FakeServer, body: Any, writer: asyncio.StreamWriter) -> None:
        if len(fake.bodies) > 3:
            await asyncio.sleep(60)
        await three_words(fake, body, writer)

    file = tmp_path / "figures.json"
    with running(fourth_stalls) as fake:
        words = [sys.executable, "-m", "llm_infer", "bench", "serving", "--base-url", fake.url, *SMALL]
        words += ["--max-concurrency", "1", "--json", str(file)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6000):
            if len(fake.bodies) == 4:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert out.startswith("interrupted: figures of what had ended by then")
    found = json.loads(file.read_text())
    assert found["interrupted"] and found["completed"] == 3 and found["failed"] == 0


def test_the_command_imports_no_jax() -> None:
    program = (
        "import sys; sys.argv = ['llm-infer', 'bench', 'serving', '--base-url', 'http://127.0.0.1:1']\n"
        "from llm_infer.commands.app import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'jax', 'flax'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.stdout == "[]\n"
