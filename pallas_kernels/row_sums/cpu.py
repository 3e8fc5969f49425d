"""row_sums natively on CPUs, called through XLA's FFI (see `pallas_kernels.cpu_ffi`); it may be differentiated and batched."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_ffi
from pallas_kernels.cpu_ffi.batches import as_rows
from pallas_kernels.dispatch import Case
from pallas_kernels.row_sums.xla import OF

_SOURCES = (str(Path(__file__).with_name("cpu_kernel.py")),)


def why_not(case: Case) -> str | None:
    """Refuses a process without llvmlite, or on a CPU for which no code can be made."""
    return cpu_ffi.why_not()


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def row_sums(x: jax.Array, shift: jax.Array, kind: str) -> jax.Array:
    """Adds up natively, see `pallas_kernels.row_sums.row_sums`; x is [R, E]."""
    return _call(kind)(x, shift)


@row_sums.defjvp
def _tangent(kind: str, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    (x, shift), (dx, dshift) = primals, tangents
    _, change = jax.jvp(OF[kind], (x - shift[:, None],), (dx - dshift[:, None],))
    return row_sums(x, shift, kind), jnp.sum(change, axis=-1)


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
