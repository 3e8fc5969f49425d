"""draw_tokens natively on CPUs, called through XLA's FFI (see `pallas_kernels.cpu_ffi`): a row is a task of one thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_ffi
from pallas_kernels.cpu_ffi.batches import as_rows
from pallas_kernels.dispatch import Case
from pallas_kernels.draw_tokens.limits import Limits

_SOURCES = tuple(str(Path(__file__).with_name(name)) for name in ("cpu_kernel.py", "limits.py"))


def why_not(case: Case) -> str | None:
    """Refuses a process without llvmlite, or on a CPU for which no code can be made."""
    return cpu_ffi.why_not()


def draw_tokens(logits: jax.Array, limits: Limits, uniform: jax.Array) -> jax.Array:
    """Draws natively, see `pallas_kernels.draw_tokens.draw_tokens`."""
    arguments = logits.astype(jnp.float32), limits.temperature, limits.top_p, limits.highest_cost(), limits.top_k
    return _call()(*arguments, limits.typical_p, uniform)


@cache
def _call() -> Callable[..., jax.Array]:
    """Makes the function of the kernel's arguments that calls it."""
    from pallas_kernels.draw_tokens.cpu_kernel import BLOCK

    def call(logits: jax.Array, *of_rows: jax.Array) -> jax.Array:
        ids, _, _ = _kernel()(logits, *of_rows, dims={"B": -(-logits.shape[1] // BLOCK)})
        return ids

    return as_rows(call, 7)


@cache
def _kernel() -> Any:
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.draw_tokens import cpu_kernel

    row, blocks = Buffer("float32", "S"), Buffer("float32", "S B")
    return Kernel(
        name="draw_tokens",
        args={
            "logits": Buffer("float32", "S V"),
            **dict.fromkeys(("temperature", "top_p", "highest"), row),
            "top_k": Buffer("int32", "S"),
            **dict.fromkeys(("typical_p", "uniform"), row),
        },
        results={"ids": Buffer("int32", "S"), "lowest": blocks, "masses": blocks},
        body=cpu_kernel.body,
        sources=_SOURCES,
    )
