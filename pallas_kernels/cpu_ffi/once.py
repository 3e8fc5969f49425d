"""A cache for what must be made once per process, even when several threads ask for it at the same time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


def once(make: Callable[..., T]) -> Callable[..., T]:
    """Caches like `functools.cache`, but a second thread that asks for a value while it is being made waits for it.

    XLA refuses a second handler of the same name, and programs are compiled side by side.
    """
    values: dict[Hashable, T] = {}
    locks: dict[Hashable, threading.Lock] = {}

    @functools.wraps(make)
    def get(*key: Hashable) -> T:
        if key not in values:
            with locks.setdefault(key, threading.Lock()):
                if key not in values:
                    values[key] = make(*key)
        return values[key]

    return get
