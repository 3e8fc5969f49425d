"""Brings rows of blocks into the tiled order in native code, from wherever they are to where they belong, as fast as memory goes.

Loading a model moves every byte of it once; NumPy's indexing takes several times as long as reading the file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from llvmlite import ir

from pallas_kernels.cpu_ffi.compile import Target, host_target, load
from pallas_kernels.cpu_ffi.emit import I8, I32, I64, POINTER, Emitter, Ptr, Value
from pallas_kernels.cpu_ffi.once import once
from pallas_kernels.quant_matmul.formats import FORMATS
from pallas_kernels.quant_matmul.tiles import FIFTH_BITS, ROWS, SEGMENTS, can_tile

_SOURCES = tuple(str(Path(__file__).parent / name) for name in ("weave.py", "tiles.py", "formats.py"))


def weave(rows: np.ndarray, out: np.ndarray, kind: str) -> None:
    """Writes rows [N, R] into `out` [N, R] in the tiled order. Runs without Python's lock.

    Raises:
        ValueError: this kind or number of rows cannot be tiled, or the arrays are not alike and contiguous.
    """
    if not can_tile(kind, rows.shape[0]):
        raise ValueError(
            f"{rows.shape[0]} rows of {kind}: expected one of {', '.join(SEGMENTS)} and a multiple of {ROWS}"
        )
    for name, array in (("rows", rows), ("out", out)):
        if array.dtype != np.uint8 or array.shape != rows.shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name}: expected contiguous uint8 {list(rows.shape)}, found {array.dtype} {list(array.shape)}"
            )
    if np.may_share_memory(rows, out):
        raise ValueError("out: expected an array of its own, found the memory of the rows")
    blocks = rows.shape[1] // FORMATS[kind].bytes
    _function(kind)(out.ctypes.data, rows.ctypes.data, rows.shape[0] // ROWS, blocks)


@once
def _function(kind: str) -> Callable[[int, int, int, int], None]:
    name = f"weave_{kind}"
    address = load(name, _SOURCES, partial(build, kind, host_target()), (name,))[name]
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)


def build(kind: str, target: Target) -> ir.Module:
    """Writes the function weave_KIND(out, rows, tiles, blocks of a row)."""
    module = ir.Module(f"weave_{kind}")
    module.triple = target.triple
    signature = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, I64, I64])
    function = ir.Function(module, signature, f"weave_{kind}")
    k = Emitter(function, target)
    out, rows = (Ptr(k, argument, I8) for argument in function.args[:2])
    tiles, blocks = (Value(k, argument) for argument in function.args[2:])
    size = FORMATS[kind].bytes
    with k.range(0, tiles) as tile, k.range(0, blocks) as block:
        to = out + (tile * blocks + block) * (size * ROWS)
        with k.range(0, ROWS) as row:
            _weave_row(to, rows + ((tile * ROWS + row) * blocks + block) * size, row, kind)
    k.finish()
    return module


def _weave_row(to: Ptr, block: Ptr, row: Value, kind: str) -> None:
    """Distributes one row's block over the tile's."""
    at = 0
    for first, length, unit in SEGMENTS[kind]:
        integer = ir.IntType(8 * unit)
        for i in range(0, length, unit):
            value = (block + (first + i)).load(0, unit).bits(integer)  # files do not align their blocks
            if FIFTH_BITS.get(kind) == first + i:
                value = _turned(value)
            (to + at * ROWS).as_(integer)[row] = value
            at += unit


def _turned(bits: Value) -> Value:
    """Returns the 32 bits with bit 4c + i in the place of bit 8i + c."""
    turned = None
    for number in range(32):
        c, i = divmod(number, 4)
        bit = (bits >> number & 1) << 8 * i + c
        turned = bit if turned is None else turned | bit
    assert turned is not None and turned.type == I32
    return turned
