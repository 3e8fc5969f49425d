"""row_sums natively on CPUs, called through XLA's FFI (see `pallas_kernels.cpu_ffi`); it may be differentiated and batched."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import cpu_ffi
from pallas_kernels.cpu_ffi.batches import as_rows
from pallas_kernels.dispatch import Case
from pallas_kernels.row_sums.gradients import differentiable

_SOURCES = (str(Path(__file__).with_name("cpu_kernel.py")),)


def why_not(case: Case) -> str | None:
    """Refuses a process without llvmlite, or on a CPU for which no code can be made."""
    return cpu_ffi.why_not()


def row_sums(x: jax.Array, shift: jax.Array, kind: str) -> jax.Array:
    """Adds up natively, see `pallas_kernels.row_sums.row_sums`; x is [R, E]."""
    return differentiable(_call(kind), kind, x, shift)


@cache
def _call(kind: str) -> Callable[..., jax.Array]:
    """Makes the function of two arrays that calls the kernel."""
    return as_rows(lambda x, shift: _kernel(kind)(x, shift)[0], 2)


@cache
def _kernel(kind: str) -> Any:
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.row_sums import cpu_kernel

    return Kernel(
        name=f"row_sums_{kind}",
        args={"x": Buffer("float32", "R E"), "shift": Buffer("float32", "R")},
        results={"sums": Buffer("float32", "R")},
        body=partial(cpu_kernel.body, kind=kind),
        sources=_SOURCES,
    )
