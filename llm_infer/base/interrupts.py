"""Keeps Ctrl-C out of the middle of a step: the books of scheduler and device must agree when it strikes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back a SIGINT that comes within the block until the block ends; a second one strikes at once.

    Only the main thread receives signals, and a handler that is not Python's cannot be put back; in either case nothing is held.
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
    except KeyboardInterrupt:  # the second one, which stands for both
        held.clear()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if held:  # also where the block has failed: whoever handles that must not go on as if nobody had pressed Ctrl-C
            before(*held[0])
