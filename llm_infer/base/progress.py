"""Progress of long operations on standard error: a bar on a terminal, one line at start and end elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

REST_OF_THE_BAR = 42
"""Columns of a bar beside its description: a long one gives way, the time does not."""

Unit = Literal["bytes", "items"]


class Task:
    """One running operation. `advance` and `set` may be called from any thread and cost next to nothing."""

    def __init__(self, description: str, total: int | None, unit: Unit) -> None:
        self.description, self.total = description, total
        self.unit: Unit = unit
        self.completed = 0
        self._lock = threading.Lock()
        self._display: Any = None
        self._started = time.perf_counter()
        self._announced = False
        self._closed = False

    def advance(self, amount: int) -> None:
        """Adds `amount` (bytes or items) to what is done."""
        with self._lock:
            self.set(self.completed + amount)

    def set(self, completed: int) -> None:
        """Sets how much is done; an amount beyond the total shows as the total."""
        self.completed = completed if self.total is None else min(completed, self.total)
        display = self._display
        if display is not None:
            display.update(display.task_ids[0], completed=self.completed)

    def _show(self, stream: TextIO) -> None:
        with self._lock:
            if self._closed or self._announced:
                return
            self._announced = True
            if stream.isatty():
                self._display = _bar(self.description, self.total, self.unit, stream)
                self._display.update(self._display.task_ids[0], completed=self.completed)
                self._display.start()
            else:
                print(f"{self.description} …", file=stream, flush=True)

    def _hide(self, stream: TextIO, finished: bool) -> None:
        with self._lock:
            self._closed = True
            if self._display is not None:
                self._display.stop()
                self._display = None
            if self._announced and finished:
                seconds = time.perf_counter() - self._started
                print(f"{self.description}: done in {seconds:.1f} s", file=stream, flush=True)


class Progress:
    """Reports operations that last longer than `delay` seconds; shorter ones leave no trace.

    Args:
        enabled: False silences everything.
        stream: where to write, standard error by default; a bar is drawn only when it is a terminal.
        delay: seconds before an operation is mentioned at all.
    """

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None, delay: float = 1.0) -> None:
        self.enabled, self.delay = enabled, delay
        self.stream = sys.stderr if stream is None else stream

    @classmethod
    def silent(cls) -> Progress:
        """Returns a reporter that reports nothing."""
        return cls(enabled=False)

    @contextmanager
    def task(self, description: str, *, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        """Reports what happens inside the `with` block. `total` is in `unit`s; None shows a spinner instead of a bar."""
        task = Task(description, total, unit)
        if not self.enabled:
            yield task
            return
        # A timer and not a check in `advance`: an operation that hangs before its first byte must be visible too.
        timer = threading.Timer(self.delay, task._show, (self.stream,))
        timer.daemon = True
        timer.start()
        finished = False
        try:
            yield task
            finished = True
        finally:
            timer.cancel()
            task._hide(self.stream, finished)

    def note(self, message: str) -> None:
        """Prints one line at once."""
        if self.enabled:
            print(message, file=self.stream, flush=True)


def _bar(description: str, total: int | None, unit: Unit, stream: TextIO) -> Any:
    # rich takes 60 ms to import: only those who see a bar pay it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    # Markup is off: a description may hold a path with brackets.
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        *amount,
        TimeElapsedColumn(),
    )
    console = Console(file=stream)
    bar = RichProgress(*columns, console=console, transient=True)
    room = max(20, console.width - REST_OF_THE_BAR)
    bar.add_task(description if len(description) <= room else description[: room - 1] + "…", total=total)
    return bar
