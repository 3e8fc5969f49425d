"""Runs something at a given line of this package's code, as a signal handler, a finalizer or a failure may."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = str(Path(__file__).parent.parent / "llm_infer")


def at_line(number: int, action: Callable[[], None], run: Callable[[], Any]) -> int:
    """Calls `run`, and `action` before the line of that number that it comes to; returns how many lines there were."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not _leaves_with(frame.f_code, frame.f_lineno, frame.f_lasti):
            count += 1
            if count == number:
                sys.settrace(None)
                frame.f_trace = None
                action()
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def _leaves_with(code: CodeType, line: int, offset: int) -> bool:
    """Whether this is the way out of a `with`, before its `__exit__`: there tracing stops, but no signal strikes."""
    if not linecache.getline(code.co_filename, line).lstrip().startswith("with "):
        return False
    return offset != next(start for start, _, at in code.co_lines() if at == line)
