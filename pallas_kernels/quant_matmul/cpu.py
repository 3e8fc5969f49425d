"""Native CPU quantised matmul, called through XLA's FFI (see `pallas_kernels.cpu_ffi`)."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import cpu_ffi
from pallas_kernels.dispatch import Case
from pallas_kernels.quant_matmul.formats import FORMATS

EVERY = 2**31
FAST_ROWS = {"q4_0": EVERY, "q4_1": EVERY, "q4_k": EVERY, "q8_0": 4}
"""Most activation rows for which int8 activations are faster than float ones, by kind; other kinds are computed exactly.

Q8_0 spends two instructions on signs that 4-bit weights do not need: on Zen 1 int8 won by 1.7 × at one row and lost by 0.8 ×
at eight (1536 × 576, 2 threads)."""


def why_not(case: Case) -> str | None:
    """Needs llvmlite and a CPU its code can be made for."""
    del case
    return cpu_ffi.why_not()


def quant_matmul(
    x: jax.Array, blocks: jax.Array, layer: jax.Array, *, kind: str, precision: str = "exact"
) -> jax.Array:
    """See `pallas_kernels.quant_matmul.quant_matmul`."""
    if precision == "fast" and x.shape[0] <= FAST_ROWS.get(kind, 0):
        return int8_kernel(kind)(x, blocks, layer, dims={"G": x.shape[1] // 32})[0]
    return matmul_kernel(kind)(x, blocks, layer)[0]


@cache
def matmul_kernel(kind: str) -> Any:
    """The kernel for one block format."""
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.quant_matmul import cpu_kernel

    here = Path(__file__).parent
    return Kernel(
        name=f"quant_matmul_{kind}",
        args={
            "x": Buffer("float32", "M K"),
            "blocks": Buffer(FORMATS[kind].dtype, "L N R"),
            "layer": Buffer("int32", ""),
        },
        results={"out": Buffer("float32", "M N")},
        body=partial(cpu_kernel.body, fmt=FORMATS[kind]),
        sources=tuple(str(here / name) for name in ("cpu_kernel.py", "cpu_tasks.py", "cpu_unpack.py", "formats.py")),
    )


@cache
def int8_kernel(kind: str) -> Any:
    """The kernel with int8 activations for one block format."""
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.quant_matmul import cpu_int8

    here = Path(__file__).parent
    return Kernel(
        name=f"quant_matmul_int8_{kind}",
        args={"x": Buffer("float32", "M K"), "blocks": Buffer("uint8", "L N R"), "layer": Buffer("int32", "")},
        results={
            "out": Buffer("float32", "M N"),
            "xq": Buffer("int8", "M K"),
            "xd": Buffer("float32", "M G"),
            "xs": Buffer("float32", "M G"),
        },
        body=partial(cpu_int8.body, fmt=FORMATS[kind]),
        sources=tuple(str(here / name) for name in ("cpu_int8.py", "cpu_tasks.py", "cpu_unpack.py", "formats.py")),
    )
