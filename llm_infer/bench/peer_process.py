"""Runs the program that measures one engine, reads its figures as they come, and says in a line why it failed."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from llm_infer.base.errors import UserError


@dataclass(frozen=True, slots=True)
class Figure:
    """What a program says of one metric.

    Attributes:
        metric: its name.
        value: tok/s, or None where there is none.
        why: why there is none.
        version: the engine's.
        precision: of weights, products and cache.
    """

    metric: str
    value: float | None
    why: str = ""
    version: str = ""
    precision: str = ""


def figures(command: Sequence[str], limit: float) -> Generator[Figure, None, None]:
    """Yields the figures of a program as it prints them; ends it where the iterator is left early.

    Args:
        command: the program and its arguments.
        limit: seconds that it may take for each figure.

    Raises:
        UserError: it cannot be run, takes too long, or fails; at its end, also if a line of it held no figure.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be run ({error.strerror}): give the Python of its venv") from None
        assert process.stdout is not None
        lines: queue.Queue[bytes | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        deadline, problem = time.monotonic() + limit, None
        try:
            # Only figures start the clock anew: an engine that hangs may go on logging.
            while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                if line.startswith(b"{"):
                    text = line.decode(errors="replace").strip()
                    if (figure := _parsed(text)) is None:
                        problem = f"it printed a line that holds no figure: {text:.100}"
                        continue
                    yield figure
                    deadline = time.monotonic() + limit
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            raise UserError(f"it gave no figure within {limit:g} s: --limit sets how long it may take") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it has started
            process.wait()
            reader.join()
            process.stdout.close()
        if status != 0:
            raise UserError(f"it ended with exit code {_named(status)}: {_last_line(errors):.200}")
        if problem is not None:
            raise UserError(problem)


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _parsed(line: str) -> Figure | None:
    try:
        found: dict[str, Any] = json.loads(line)
        why = str(found.get("why", ""))
        value = None if why and found["value"] is None else float(found["value"])
        metric = str(found["metric"])
    except (ValueError, KeyError, TypeError):
        return None
    if value is not None and not (math.isfinite(value) and value > 0):
        return None
    return Figure(metric, value, why, str(found.get("version", "")), str(found.get("precision", "")))


def _named(status: int) -> str:
    return f"{status} ({signal.Signals(-status).name})" if -status in set(signal.Signals) else str(status)


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
    return (errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
