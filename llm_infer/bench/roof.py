"""Measures how fast this machine's memory can be read by the threads of the native kernels: the limit of a decode step."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_ffi

BYTES = 1 << 29
TASK = 1 << 20  # bytes of a task
ROUNDS = 5


def read_bandwidth() -> float | None:
    """Returns GB/s of reading half a gigabyte once, the best of a few rounds; None where native kernels cannot run."""
    if cpu_ffi.why_not() is not None:
        return None
    x = jnp.ones(BYTES // 4, jnp.int32)
    read = jax.jit(lambda x: _kernel()(x, dims={"T": BYTES // TASK})[0])
    read(x).block_until_ready()
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        read(x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return BYTES / best / 1e9


@cache
def _kernel() -> Any:
    """Makes a kernel that adds up all numbers, a task's in a few vectors."""
    from pallas_kernels.cpu_ffi.bridge import Frame, Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.cpu_ffi.emit import I32, Emitter, Value

    def task(k: Emitter, a: Frame, number: Value) -> None:
        at, lanes = a.x + number * (TASK // 4), k.lanes
        sums = [k.var(k.zeros(I32, lanes)) for _ in range(4)]
        with k.range(0, TASK // 4, 4 * lanes) as i:
            for j, sum_ in enumerate(sums):
                sum_.v = sum_.v + at.load(i + j * lanes, lanes)
        total = sums[0].v
        for sum_ in sums[1:]:
            total = total + sum_.v
        a.out[number] = k.sum_lanes(total)

    def body(k: Emitter, a: Frame) -> None:
        a.require((a.T * (TASK // 4)).eq(a.N), f"result out: expected a number for each {TASK} bytes")
        a.parallel(a.T, task)

    return Kernel("read_memory", {"x": Buffer("int32", "N")}, {"out": Buffer("int32", "T")}, body, (__file__,))
