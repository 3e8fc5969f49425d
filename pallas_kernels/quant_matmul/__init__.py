"""Matmul with weights that stay in GGUF blocks: the contract that every implementation keeps, and the entry point.

Axis letters: M activation rows, K their width, N output features (weight rows), L layers, R items of a weight row.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of, expect, layer_index
from pallas_kernels.quant_matmul.formats import FORMATS, BlockFormat
from pallas_kernels.quant_matmul.gradients import Call, Operands, differentiable
from pallas_kernels.quant_matmul.inputs import Norm
from pallas_kernels.quant_matmul.reference import dequantise
from pallas_kernels.quant_matmul.tiles import ROWS, can_tile, untile

__all__ = [
    "FORMATS",
    "PRECISIONS",
    "BlockFormat",
    "Norm",
    "dequantise",
    "quant_matmul",
    "switched_matmul",
    "tiles_pay",
    "untile",
]

PRECISIONS = ("exact", "fine", "fast")


def quant_matmul(
    x: jax.Array,
    blocks: jax.Array,
    layer: jax.Array | int = 0,
    gate: jax.Array | None = None,
    norm: Norm | None = None,
    *,
    kind: str,
    precision: str = "exact",
    tiled: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies x with the transposed weights of one layer, from the file's own blocks.

    `exact`: the relative error is about 1e-7, that of a float32 sum of the products with dequantised weights.
    `fast`: the implementation may round activations to int8 in blocks of 32, as llama.cpp does; `fine`: to 16 bits.
    With the native CPU implementation, a row of the result has the same bits for any M and any number of threads.
    It may be differentiated (in reverse) by x, gate, norm and dense blocks; gradients are exact whatever the precision.

    Args:
        x: Float[Array, "M K"] float32.
        blocks: UInt8[Array, "L N R"], rows of K weights in GGUF blocks of `kind`, R = FORMATS[kind].row_items(K); for
            the dense kinds f32, f16 and bf16 the array [L, N, K] of that dtype. K is a multiple of 32 for all of them.
        layer: Int32 scalar, may be traced.
        gate: Float[Array, "M K"] float32: silu(gate) · x is multiplied instead of x (SwiGLU); None for x.
        norm: x is normalised first; not together with a gate.
        kind: a key of FORMATS.
        precision: one of PRECISIONS.
        tiled: whether the rows have the tiled order, see `tiles`; N is a multiple of 16.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        Float[Array, "M N"] float32.

    Raises:
        ValueError: at trace time, for shapes, dtypes or names other than these.
    """
    call, norm = _checked(x, blocks, gate, norm, kind, precision, tiled, implementation)
    index = layer_index(layer, blocks.shape[0])
    return differentiable((call,), Operands(x, (blocks,), None, index, gate, norm))


def switched_matmul(
    x: jax.Array,
    stacks: Sequence[jax.Array],
    stack: jax.Array,
    layer: jax.Array,
    gate: jax.Array | None = None,
    norm: Norm | None = None,
    *,
    kinds: Sequence[str],
    precision: str = "exact",
    tiled: Sequence[bool] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies as `quant_matmul`, with a layer of one of several stacks, which is chosen when the program runs.

    It computes what `lax.switch` over calls of `quant_matmul` would, and its gradient copies no stack.

    Args:
        x: Float[Array, "M K"] float32.
        stacks: blocks of `quant_matmul`, all with the same K and N.
        stack: Int32 scalar, the number of the stack.
        layer: Int32 scalar, the layer's number in its stack.
        gate: as of `quant_matmul`.
        norm: as of `quant_matmul`.
        kinds: of each stack.
        precision: one of PRECISIONS.
        tiled: of each stack; None where none is.
        implementation: name of the implementation to use for all.

    Returns:
        Float[Array, "M N"] float32.

    Raises:
        ValueError: at trace time, for shapes, dtypes or names other than these.
    """
    tiled = (False,) * len(stacks) if tiled is None else tiled
    if not len(stacks) == len(kinds) == len(tiled) or not stacks:
        raise ValueError(f"{len(stacks)} stacks, {len(kinds)} kinds, {len(tiled)} tiled: expected as many of each")
    calls: tuple[Call, ...] = ()
    for blocks, kind, is_tiled in zip(stacks, kinds, tiled, strict=True):
        call, norm = _checked(x, blocks, gate, norm, kind, precision, is_tiled, implementation)
        expect(blocks.shape[1] == stacks[0].shape[1], "stacks", f"N={stacks[0].shape[1]} rows in each", blocks)
        calls += (call,)
    number = layer_index(stack, len(stacks))
    index = layer_index(layer, max(blocks.shape[0] for blocks in stacks))
    return differentiable(calls, Operands(x, tuple(stacks), number if len(calls) > 1 else None, index, gate, norm))


def _checked(
    x: jax.Array,
    blocks: jax.Array,
    gate: jax.Array | None,
    norm: Norm | None,
    kind: str,
    precision: str,
    tiled: bool,
    implementation: str | None,
) -> tuple[Call, Norm | None]:
    """Returns the call that these arguments of `quant_matmul` ask for, and the norm with its layer as an array.

    Raises:
        ValueError: one of them is not as `quant_matmul` says.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(FORMATS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    expect(x.ndim == 2 and x.dtype == jnp.float32, "x", "float32 [M, K]", x)
    if gate is not None:
        legal = gate.shape == x.shape and gate.dtype == jnp.float32
        expect(legal, "gate", f"float32 {list(x.shape)}, as x", gate)
    if norm is not None:
        legal = norm.weight.ndim == 2 and norm.weight.shape[1] == x.shape[1] and norm.weight.dtype == jnp.float32
        expect(legal and gate is None, "norm", f"float32 [L, {x.shape[1]}] and no gate", norm.weight)
        norm = norm._replace(layer=layer_index(norm.layer, norm.weight.shape[0]))
    fmt = FORMATS[kind]
    legal = blocks.ndim == 3 and blocks.dtype.name == fmt.dtype
    expect(legal, "blocks", f"{fmt.dtype} [L, N, R] for {kind}", blocks)
    items = fmt.row_items(x.shape[1])
    expect(blocks.shape[2] == items, "blocks", f"rows of {items} {fmt.dtype} (K={x.shape[1]} {kind})", blocks)
    if tiled and not can_tile(kind, blocks.shape[1]):
        raise ValueError(f"blocks: tiled rows of {kind} must be a multiple of {ROWS}, found {blocks.shape[1]}")
    case = case_of({"x": x, "blocks": blocks}, kind=kind, precision=precision, tiled=tiled)
    return Call(dispatch.pick("quant_matmul", case, implementation), kind, precision, tiled), norm


def tiles_pay(kind: str, rows: int) -> bool:
    """Checks whether matrices with this many rows of a kind are best kept in the tiled order on this process's CPU.

    They are wherever there are instructions for products of bytes.
    """
    from pallas_kernels import cpu_ffi

    if cpu_ffi.why_not() is not None or not can_tile(kind, rows):
        return False
    from pallas_kernels.cpu_ffi.compile import host_target

    host = host_target()
    return any(host.has(feature) for feature in ("avx512vnni", "avxvnni", "dotprod", "avx2"))
