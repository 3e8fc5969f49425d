"""The thread pool of the native CPU kernels: `parallel_run(task, frame, n)` calls task(frame, 0 … n-1) on a few threads.

It is built for many short calls (a decode step makes hundreds of 20-500 µs each): helpers spin for a few tens of µs before they
sleep, the caller works too, and it never waits for a helper that has not begun. One call at a time has the helpers: a
second device that calls meanwhile runs its own tasks on its own thread, so there is neither oversubscription nor an abort
(Numba's workqueue layer aborts there; XLA's own pool may be full of callers).
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

from pallas_kernels.cpu_ffi.compile import load
from pallas_kernels.cpu_ffi.once import once
from pallas_kernels.cpu_ffi.pool_code import LIMIT, SPIN, build_pool

THREADS_VARIABLE = "LLM_INFER_NUM_THREADS"
SPIN_MICROSECONDS = 60  # longer than the gap between two kernels of a decode step, short compared with a scheduler tick


def default_threads() -> int:
    """Returns $LLM_INFER_NUM_THREADS, else the number of CPUs this process may use (by affinity and the container's quota).

    Raises:
        ValueError: the variable is not a positive integer.
    """
    text = os.environ.get(THREADS_VARIABLE)
    if text is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cpus, _quota()))
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{THREADS_VARIABLE}={text!r}: expected a positive integer, the number of kernel threads")
    return int(text)


def _quota() -> int:
    """Returns how many CPUs the control group (version 2) allows, rounded up; very many where there is no limit."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = (limit.read_text().split() if limit.is_file() else ["max", "1"])[:2]
    return 10_000 if quota == "max" else -(-int(quota) // int(period))


class ThreadPool:
    """The process's one pool: started with `threads`, changed with `set_threads` (the caller counts as one)."""

    def __init__(self) -> None:
        names = ("parallel_run", "num_threads", "start_helper", "prepare_pool", "spin")
        code = load("pool", (), build_pool, names)
        self.symbols = {name: code[name] for name in names[:2]}  # what kernels call
        self._start = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)(code["start_helper"])
        self._state = ctypes.CFUNCTYPE(ctypes.c_void_p)(code["prepare_pool"])()
        self._helpers = 0
        spin = ctypes.CFUNCTYPE(None, ctypes.c_int64)(code["spin"])
        rates = []
        for _ in range(3):
            begin = time.perf_counter()
            spin(10_000)
            rates.append(time.perf_counter() - begin)
        self._write(SPIN, ctypes.c_int64, int(SPIN_MICROSECONDS * 1e-6 * 10_000 / min(rates)))

    def _write(self, offset: int, type_: type, value: int) -> None:
        type_.from_address(self._state + offset).value = value

    @property
    def threads(self) -> int:
        return ctypes.c_int32.from_address(self._state + LIMIT).value

    def set_threads(self, threads: int) -> None:
        """Sets the number of threads from the next kernel call on.

        Raises:
            ValueError: there would be fewer than one.
            OSError: the system gives no more threads.
        """
        if threads < 1:
            raise ValueError(f"threads={threads}: expected at least 1")
        while self._helpers < threads - 1:
            if error := self._start(self._helpers + 1):
                raise OSError(error, f"cannot start kernel thread {self._helpers + 1}: set {THREADS_VARIABLE} lower")
            self._helpers += 1
        self._write(LIMIT, ctypes.c_int32, threads)


@once
def thread_pool() -> ThreadPool:
    """Returns the pool, which is made on first use with `default_threads()`."""
    if sys.platform == "win32":
        raise OSError("the native CPU kernels need POSIX threads; use the XLA implementation on Windows")
    pool = ThreadPool()
    pool.set_threads(default_threads())
    return pool
