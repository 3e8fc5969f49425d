"""Call a native CPU kernel's handler with a call frame made by hand: no XLA, no compilation per shape."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pallas_kernels.cpu_ffi.bridge import Kernel
from pallas_kernels.cpu_ffi.call_frame import DTYPES, EXECUTE_STAGE
from pallas_kernels.cpu_ffi.compile import host_target, load
from pallas_kernels.cpu_ffi.threads import thread_pool

_handlers: dict[str, Callable[[int], int | None]] = {}


def handler(kernel: Kernel, lanes: int | None = None, features: str | None = None) -> Callable[[int], int | None]:
    """The kernel's entry; with `lanes`, as it is written for a CPU of that vector width (LLVM splits what is too wide), with
    `features`, for one that has these alone."""
    target, name = host_target(), kernel.name
    if lanes is not None:
        target, name = replace(target, lanes=lanes, unit_lanes=lanes, registers=32), f"{name}_lanes{lanes}"
    if features is not None:
        target, name = replace(target, features=features), f"{name}_features{features}"
    if name not in _handlers:
        address = load(name, kernel.sources, lambda: kernel.build(target), ("handler",), thread_pool().symbols)[
            "handler"
        ]
        _handlers[name] = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
    return _handlers[name]


def call(
    kernel: Kernel,
    args: list[np.ndarray],
    results: list[np.ndarray],
    stage: int = EXECUTE_STAGE,
    lanes: int | None = None,
    features: str | None = None,
) -> list[np.ndarray]:
    """Run the handler on numpy arrays (results are written in place). A refusal is a crash here: there is no XLA."""
    keep: list = []

    def group(arrays: list[np.ndarray]) -> list[int]:
        pointers = (ctypes.c_void_p * len(arrays))()
        kinds = (ctypes.c_int32 * len(arrays))(*[1] * len(arrays))
        for i, array in enumerate(arrays):
            dims = (ctypes.c_int64 * max(1, array.ndim))(*array.shape)
            code = DTYPES[array.dtype.name][0]
            record = (ctypes.c_int64 * 6)(48, 0, code, array.ctypes.data, array.ndim, ctypes.addressof(dims))
            pointers[i] = ctypes.addressof(record)
            keep.extend((dims, record))
        keep.extend((pointers, kinds))
        return [40, 0, len(arrays), ctypes.addressof(kinds), ctypes.addressof(pointers)]

    frame = (ctypes.c_int64 * 20)(160, 0, 0, 0, stage, *group(args), *group(results), 40, 0, 0, 0, 0)
    assert not handler(kernel, lanes, features)(ctypes.addressof(frame))
    return results
