"""Scaled matmul on a GPU through Pallas' Triton lowering, for scales per group: weights are widened in registers.

XLA would write the dequantised weights to memory. A step of the loop is a group (or the part of one that fits); its product
is scaled before it is added.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Case
from pallas_kernels.gpu_devices import why_not_capability
from pallas_kernels.triton_offsets import why_not_offsets


def why_not(case: Case) -> str | None:
    """Refuses all but NVIDIA GPUs from Ampere on, and but several groups of multiples of 16 (int4: 32) weights that
    Triton can address."""
    groups, width = case.shapes["scales"][2], case.shapes["x"][1]
    dtype = case.dtypes["weights"]
    if groups == 1:
        return "is for scales per group: with one per output feature XLA fuses as well"
    least = 32 if dtype == "uint8" else 16
    if width // groups % least:
        return f"multiplies {least} weights of a group at a time, found groups of {width // groups}"
    if reason := why_not_offsets(case.shapes["weights"], 1):
        return reason
    float8 = dtype == "float8_e4m3fn"
    return why_not_capability(case.device_kind, (8, 9) if float8 else (8, 0), f"for {dtype} weights")


def scaled_matmul(
    x: jax.Array, weights: jax.Array, scales: jax.Array, layer: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Multiplies on a GPU, see `pallas_kernels.scaled_matmul.scaled_matmul`; `interpret` runs the kernel in Pallas'
    interpreter."""
    rows, (_, features, stored) = x.shape[0], weights.shape
    exact = x.dtype == jnp.float32
    tile = min(32 if exact else 128, max(16, 1 << (rows - 1).bit_length()))
    stored_group = stored // scales.shape[2]
    depth = min(32 if exact else 128, stored_group & -stored_group)  # the largest power of two in a group
    # Few rows leave few tiles: narrow ones then reach more multiprocessors.
    columns = 128 if tile == 128 else 64 if tile >= 32 and not exact else 32
    grid = (pl.cdiv(rows, tile), pl.cdiv(features, columns))
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, columns=columns, depth=depth),
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8 if tile == 128 else 4, num_stages=2 if exact else 3),
        interpret=interpret,
        name=f"scaled_matmul_{weights.dtype.name}_{tile}",
    )(layer.reshape(1), x, weights, scales)


def _kernel(layer_ref, x_ref, weights_ref, scales_ref, out_ref, *, tile: int, columns: int, depth: int) -> None:
    rows, width = x_ref.shape
    _, features, stored = weights_ref.shape
    packed = weights_ref.dtype == jnp.uint8
    stored_group = stored // scales_ref.shape[2]
    group = width // scales_ref.shape[2]
    steps = stored_group // depth
    layer = layer_ref[0]
    row = (pl.program_id(0) * tile + jnp.arange(tile, dtype=jnp.int32))[:, None]
    column = pl.program_id(1) * columns + jnp.arange(columns, dtype=jnp.int32)
    offset = jnp.arange(depth, dtype=jnp.int32)[None, :]
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def product(first: jax.Array, w: jax.Array) -> jax.Array:
        """Multiplies `depth` activations from `first` on with weights [columns, depth]."""
        x = plgpu.load(x_ref.at[row, first + offset], mask=jnp.broadcast_to(row < rows, (tile, depth)), other=0.0)
        return lax.dot_general(
            *(x, w.astype(x.dtype), (((1,), (1,)), ((), ()))), precision=precision, preferred_element_type=jnp.float32
        )

    def add(step: jax.Array, acc: jax.Array) -> jax.Array:
        index = lax.div(step, jnp.int32(steps))
        within = lax.rem(step, jnp.int32(steps)) * depth
        in_range = column < features
        mask = jnp.broadcast_to(in_range[:, None], (columns, depth))
        zero = jnp.zeros((), weights_ref.dtype)
        at = layer, column[:, None], index * stored_group + within + offset
        w = plgpu.load(weights_ref.at[at], mask=mask, other=zero)
        scale = plgpu.load(scales_ref.at[layer, column, index], mask=in_range, other=0.0).astype(jnp.float32)
        first = index * group + within
        if packed:
            numbers = w.astype(jnp.int32)
            low, high = ((part - 8).astype(jnp.float32) for part in (numbers & 15, numbers >> 4))
            total = product(first, low) + product(first + group // 2, high)
        else:
            total = product(first, w.astype(jnp.float32))
        return acc + total * scale[None, :]

    acc = lax.fori_loop(0, stored // depth, add, jnp.zeros((tile, columns), jnp.float32))
    mask = (row < rows) & (column < features)[None, :]
    plgpu.store(out_ref.at[row, column[None, :]], acc.astype(out_ref.dtype), mask=mask)
