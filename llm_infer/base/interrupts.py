"""Keeps Ctrl-C out of the middle of a step: the books of scheduler and device must agree when it strikes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds a SIGINT that comes within the block back until its end; a second one strikes at once.

    Only the main thread receives signals, and a handler that is not Python's cannot be put back: there it does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple] = []

    def hold(*args: object) -> None:
        held.append(args)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    except KeyboardInterrupt:  # the second one, which says it for both
        held.clear()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if held:  # also where the block has failed: who handles that failure must not go on as if nobody had pressed
            before(*held[0])
