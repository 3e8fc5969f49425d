"""Shares the weight rows of native CPU matmuls among threads. (No result depends on it.)"""

from __future__ import annotations

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import Emitter, Value

TASKS_PER_THREAD = 8  # enough that threads end together; fewer, longer tasks read memory in longer runs


def task_rows(k: Emitter, a: Frame, tile_rows: int, most: Value | int) -> Value:
    """Returns the weight rows of a task: whole tiles, at most `most` of the N rows."""
    share = a.N // (a.num_threads() * TASKS_PER_THREAD * tile_rows) * tile_rows
    return k.max(k.min(share, most if isinstance(most, Value) else k.i64(most)), tile_rows)
