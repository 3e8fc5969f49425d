"""Progress reports: silent when short or switched off, two lines without a terminal, a bar on one."""

from __future__ import annotations

import re
import time
from io import StringIO

import pytest

from llm_infer.base.progress import Progress


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_short_operations_leave_no_trace() -> None:
    stream = StringIO()
    with Progress(stream=stream).task("short", total=10) as task:
        task.advance(10)
    assert stream.getvalue() == ""


def test_without_a_terminal_one_line_at_start_and_end() -> None:
    stream = StringIO()
    with Progress(stream=stream, delay=0.01).task("long", total=10) as task:
        time.sleep(0.1)
        task.advance(10)
    first, second = stream.getvalue().splitlines()
    assert first == "long …" and second.startswith("long: done in 0.")


def test_a_failure_has_no_line_that_says_done() -> None:
    stream = StringIO()
    with pytest.raises(KeyError), Progress(stream=stream, delay=0.01).task("long"):
        time.sleep(0.1)
        raise KeyError
    assert stream.getvalue() == "long …\n"


@pytest.mark.parametrize("total", [2_000_000, None])
def test_a_bar_on_a_terminal(total: int | None) -> None:
    stream = Terminal()
    with Progress(stream=stream, delay=0.01).task("load [x]", total=total, unit="bytes") as task:
        for _ in range(4):
            task.advance(1_000_000)
            time.sleep(0.1)
    text = stream.getvalue()
    assert "load [x]" in text and "load [x]: done in" in text
    assert task.completed == (4_000_000 if total is None else 2_000_000)


def test_a_long_description_leaves_room_for_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Progress(stream=stream, delay=0.01).task("Compiling " + "x" * 70, total=12):
        time.sleep(0.2)
    assert "0/12 0:00:00" in re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_silence() -> None:
    stream = StringIO()
    progress = Progress(enabled=False, stream=stream, delay=0.0)
    with progress.task("long"):
        time.sleep(0.05)
    progress.note("something")
    assert stream.getvalue() == ""
