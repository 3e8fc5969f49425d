"""Native CPU quantised matmul, called through XLA's FFI (see `pallas_kernels.cpu_ffi`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_ffi, tuned
from pallas_kernels.cpu_ffi.batches import as_rows
from pallas_kernels.dispatch import Case
from pallas_kernels.quant_matmul.formats import FORMATS
from pallas_kernels.quant_matmul.inputs import Norm, prepared
from pallas_kernels.quant_matmul.tiles import TILE_GROUP, TOGETHER

TILE_SOURCES = tuple(
    f"{name}.py"
    for name in (
        "cpu_tiles",
        "cpu_activations",
        "cpu_tile_kinds",
        "cpu_dot",
        "cpu_amx",
        "cpu_unpack",
        "cpu_tasks",
        "tiles",
        "formats",
    )
)
INT8_KINDS = ("q4_0", "q4_1", "q8_0", "q4_k")  # these have a kernel with int8 activations; others are computed exactly


def digits(kind: str, precision: str) -> int:
    """Returns the number of 8-bit digits into which the kernel for tiled rows cuts activations.

    `fast` gives 8-bit weights 16 bits: files keep in them what matters most, the head above all, and there 8 bits cost more
    agreement with `exact` than all other matrices together.
    """
    return {"exact": 3, "fine": 2, "fast": 2 if kind == "q8_0" else 1}[precision]


INT8_ROWS: dict[str, int] = {"q8_0": 4}
"""Most activation rows for which int8 activations pay where nothing was measured; for kinds not named they always do.

Q8_0 spends instructions on signs that 4-bit weights do not need."""


def why_not(case: Case) -> str | None:
    """Refuses a process without native kernels, and cases for which XLA was measured to be faster."""
    if reason := cpu_ffi.why_not():
        return reason
    kind, rows = case.options["kind"], case.shapes["x"][0]
    if case.options.get("tiled"):
        return None
    most = _measured(kind).get("native_rows")
    if most is not None and rows > most and not _rounds(kind, rows, case.options["precision"]):
        return f"is slower than XLA for more than {most} rows of {kind} on this CPU, found {rows}"
    return None


def _measured(kind: str) -> dict[str, int | None]:
    from pallas_kernels.cpu_ffi.compile import host_target

    return tuned.crossovers(host_target().cpu).get(kind, {})


def _rounds(kind: str, rows: int, precision: str) -> bool:
    """Checks whether activations are rounded to int8."""
    most = _measured(kind).get("int8_rows", INT8_ROWS.get(kind))
    return precision == "fast" and kind in INT8_KINDS and (most is None or rows <= most)


def quant_matmul(
    x: jax.Array,
    blocks: jax.Array,
    layer: jax.Array,
    gate: jax.Array | None = None,
    norm: Norm | None = None,
    *,
    kind: str,
    precision: str = "exact",
    tiled: bool = False,
) -> jax.Array:
    """Multiplies natively, see `pallas_kernels.quant_matmul.quant_matmul`."""
    if not tiled:
        rounds = _rounds(kind, x.shape[0], precision)
        return _rows_call(kind, rounds)(prepared(x, gate, norm), blocks, layer)
    gates = () if gate is None else (gate,)
    norms = () if norm is None else (norm.weight, norm.layer, jnp.float32(norm.eps))
    return _tiles_call(kind, precision, bool(gates), bool(norms))(x, *gates, blocks, layer, *norms)


@cache
def _rows_call(kind: str, rounds: bool) -> Callable[..., jax.Array]:
    """Makes the function of x, blocks and layer that multiplies with rows in the file's order."""

    def call(x: jax.Array, *stored: jax.Array) -> jax.Array:
        if rounds:
            return int8_kernel(kind)(x, *stored, dims={"G": x.shape[1] // 32})[0]
        return matmul_kernel(kind)(x, *stored)[0]

    return as_rows(call, 1)


@cache
def _tiles_call(kind: str, precision: str, gated: bool, normed: bool) -> Callable[..., jax.Array]:
    """Makes the function of x, the gate, blocks, layer and the norm's three numbers that multiplies with tiled rows."""

    def call(x: jax.Array, *rest: jax.Array) -> jax.Array:
        gates, (blocks, layer, *norms) = rest[:gated], rest[gated:]
        rows, width = x.shape
        dims = {"A": -(-rows // TILE_GROUP), "G": width // 32, "S": places(rows)}
        return tiles_kernel(kind, precision, gated, normed)(x, blocks, layer, *gates, *norms, dims=dims)[0]

    return as_rows(call, 1 + gated)


def places(rows: int) -> int:
    """Returns the number of places for the rows of a group; few rows lie close together."""
    return rows if rows <= TOGETHER else TILE_GROUP


@cache
def matmul_kernel(kind: str) -> Any:
    """Makes the kernel for one block format."""
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
    """Makes the kernel with int8 activations for one block format."""
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
        sources=tuple(
            str(here / name) for name in ("cpu_int8.py", "cpu_dot.py", "cpu_tasks.py", "cpu_unpack.py", "formats.py")
        ),
    )


@cache
def tiles_kernel(kind: str, precision: str, gated: bool = False, normed: bool = False) -> Any:
    """Makes the kernel for tiled rows of one block format (see `tiles`).

    Where they round activations, `gated` ones compute silu(gate) · x, and `normed` ones an RMSNorm.
    """
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.quant_matmul import cpu_activations, cpu_tiles

    gates = {"gate": Buffer("float32", "M K")} if gated else {}
    norms = {"norm": Buffer("float32", "H K"), "norm_layer": Buffer("int32", ""), "eps": Buffer("float32", "")}
    here, count = Path(__file__).parent, digits(kind, precision)
    return Kernel(
        name=f"quant_matmul_tiles_{8 * count}bit_{kind}{'_gated' if gated else '_normed' if normed else ''}",
        args={
            "x": Buffer("float32", "M K"),
            "blocks": Buffer("uint8", "L N R"),
            "layer": Buffer("int32", ""),
            **gates,
            **(norms if normed else {}),
        },
        results={
            "out": Buffer("float32", "M N"),
            "xq": Buffer("int8", f"A G S {cpu_activations.units(kind, count)} {cpu_activations.BLOCK}"),
            "xd": Buffer("float32", "A G S"),
            "xs": Buffer("float32", "A G S 2"),
        },
        body=partial(cpu_tiles.body, fmt=FORMATS[kind], digits=count, gated=gated, normed=normed),
        sources=tuple(str(here / name) for name in TILE_SOURCES),
    )
