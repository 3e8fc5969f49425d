"""Native CPU causal convolution, through XLA's FFI (see `pallas_kernels.cpu_ffi`): a row has the same bits in any batch."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_ffi
from pallas_kernels.causal_conv import StateRows
from pallas_kernels.dispatch import Case

MOST_TAPS = 8
"""The last inputs of a vector of channels stay in registers."""
_SOURCES = (str(Path(__file__).with_name("cpu_kernel.py")),)


def why_not(case: Case) -> str | None:
    """Refuses a process without native kernels, other numbers than float32, and long convolutions."""
    if reason := cpu_ffi.why_not():
        return reason
    for name in ("x", "states"):
        if case.dtypes[name] != "float32":
            return f"computes in float32, found {name} of {case.dtypes[name]}"
    taps = case.shapes["taps"][1]
    return None if taps <= MOST_TAPS else f"takes up to {MOST_TAPS} taps, found {taps}"


def causal_conv(
    x: jax.Array, taps: jax.Array, states: jax.Array, rows: StateRows, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Convolves natively, see `pallas_kernels.causal_conv.causal_conv`. Rows past the last sequence's give 0."""
    out, states = _kernel(taps.shape[1])(x, taps.astype(jnp.float32).T, states, *rows, layer)
    return out, states


@cache
def _kernel(taps: int) -> Any:
    from pallas_kernels.causal_conv import cpu_kernel
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer

    rows, states = Buffer("float32", "T E"), Buffer("float32", f"L N {taps - 1} E")
    fields = {name: Buffer("int32", "S1" if name == "q_start" else "S") for name in StateRows._fields}
    return Kernel(
        name=f"causal_conv_{taps}",
        args={
            "x": rows,
            "taps": Buffer("float32", f"{taps} E"),
            "states": states,
            **fields,
            "layer": Buffer("int32", ""),
        },
        results={"out": rows, "states_out": states},
        aliases={"states": "states_out"},
        body=partial(cpu_kernel.body, taps=taps),
        sources=_SOURCES,
    )
