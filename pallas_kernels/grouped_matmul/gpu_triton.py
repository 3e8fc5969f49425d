"""Grouped matmul on a GPU through Pallas' Triton lowering: a thread block takes a tile of one expert's rows and features.

Which tile belongs to which expert follows from the group sizes in a few small XLA operations; experts without rows cost nothing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Case, target
from pallas_kernels.gpu_devices import STREAMING_MULTIPROCESSORS, shared_memory, why_not_capability


def why_not(case: Case) -> str | None:
    """Refuses all but NVIDIA GPUs from Ampere on."""
    return why_not_capability(case.device_kind, (8, 0), "for Triton")


class Blocks(NamedTuple):
    """Sizes of a thread block: `tile` rows of one expert by `columns` features, `depth` of the width in each step of its loop,
    of which `stages` are fetched ahead."""

    tile: int
    columns: int
    depth: int
    warps: int
    stages: int


# Sizes of each tile: where there are many blocks, and where there are few.
_SIZES = {
    16: (Blocks(16, 64, 128, 4, 4), Blocks(16, 16, 256, 2, 4)),
    32: (Blocks(32, 64, 128, 4, 4), Blocks(32, 64, 128, 4, 4)),
    64: (Blocks(64, 256, 64, 4, 4), Blocks(64, 64, 128, 4, 4)),
    128: (Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 64, 8, 4)),
}


def choose_blocks(rows: int, num_experts: int, features: int, device_kind: str, *, exact: bool) -> Blocks:
    """Chooses sizes, for bfloat16 by what was fastest on an H100 (docs/performance.md); `exact` for float32 products.

    A row's sums have the same bits with all of them: a thread block adds up the whole width from its beginning.
    """
    # Were the rows even, a tile would hold all of an expert's, between what a matrix unit takes and what registers hold.
    per_expert = pl.cdiv(rows, num_experts)
    tile = min(64 if exact else 128, max(16, 1 << (per_expert - 1).bit_length()))
    if exact:
        return Blocks(tile, 64, 32, 4, 2)
    wide, narrow = _SIZES[tile]
    blocks = pl.cdiv(features, wide.columns) * (num_experts + rows // tile)
    chosen = wide if blocks >= STREAMING_MULTIPROCESSORS else narrow  # more and smaller blocks fill the chip
    fit = shared_memory(device_kind) // ((tile + chosen.columns) * chosen.depth * 2)
    return chosen._replace(stages=min(chosen.stages, fit))


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    layer: jax.Array,
    *,
    dtype: DTypeLike | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies on a GPU, see `pallas_kernels.grouped_matmul.grouped_matmul`.

    `blocks` are the sizes to use; None takes what `choose_blocks` says. `interpret` runs the kernel in Pallas' interpreter.
    """
    rows, num_experts = x.shape[0], group_sizes.shape[0]
    features = weights.shape[1] // num_experts
    if blocks is None:
        exact = jnp.promote_types(x.dtype, weights.dtype) == jnp.float32
        blocks = choose_blocks(rows, num_experts, features, target()[1], exact=exact)
    tiles = _tiles(group_sizes, rows, blocks.tile)
    if rows < blocks.tile:  # were all rows of a tile known to be the same one, its loads would not be fetched ahead
        x = jnp.pad(x, ((0, blocks.tile - rows), (0, 0)))
    return pl.pallas_call(
        functools.partial(_kernel, features, tile=blocks.tile, columns=blocks.columns, depth=blocks.depth),
        grid=(tiles.shape[0], pl.cdiv(features, blocks.columns)),
        out_shape=jax.ShapeDtypeStruct((rows, features), dtype or x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=f"grouped_matmul_{weights.dtype.name}_{blocks.tile}",
    )(tiles, layer.reshape(1), x, weights)


def _tiles(group_sizes: jax.Array, rows: int, tile: int) -> jax.Array:
    """Returns the tiles, Int32 [X + 1 + M // tile, 3]: expert, first row and end of its rows; expert X stands for the rows of
    nobody."""
    nobody = rows - jnp.sum(group_sizes, keepdims=True)
    sizes = jnp.concatenate([group_sizes, nobody])
    row_ends = jnp.cumsum(sizes, dtype=jnp.int32)
    counts = lax.div(sizes + (tile - 1), jnp.int32(tile))
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(sizes.shape[0] + rows // tile, dtype=jnp.int32)
    expert = jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    used, expert = expert < sizes.shape[0], jnp.minimum(expert, sizes.shape[0] - 1)
    first = (row_ends - sizes)[expert] + (index - (ends - counts)[expert]) * tile
    return jnp.stack([expert, first, jnp.where(used, row_ends[expert], first)], axis=1)


def _kernel(features: int, tiles_ref, layer_ref, x_ref, weights_ref, out_ref, *, tile: int, columns: int, depth: int):
    width = x_ref.shape[1]
    num_experts = weights_ref.shape[1] // features
    index, block = pl.program_id(0), pl.program_id(1)
    expert, first, end = tiles_ref[index, 0], tiles_ref[index, 1], tiles_ref[index, 2]
    layer = layer_ref[0]
    dtype = jnp.promote_types(x_ref.dtype, weights_ref.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    @pl.when(first < end)
    def _multiply() -> None:
        row = first + jnp.arange(tile, dtype=jnp.int32)
        column = block * columns + jnp.arange(columns, dtype=jnp.int32)
        # What a tile has too much reads something else instead, and is not stored: loads without masks are fetched ahead.
        x_row = jnp.minimum(row, x_ref.shape[0] - 1)[:, None]
        w_row = (expert * features + jnp.minimum(column, features - 1))[:, None]

        def add(step: jax.Array, acc: jax.Array) -> jax.Array:
            k = (step * depth + jnp.arange(depth, dtype=jnp.int32))[None, :]
            inside = {} if width % depth == 0 else {"mask": k < width, "other": 0.0}
            x = plgpu.load(x_ref.at[x_row, k], **inside)
            w = plgpu.load(weights_ref.at[layer, w_row, k], **inside)
            product = lax.dot_general(
                x.astype(dtype),
                w.astype(dtype),
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            return acc + product

        # Nobody's rows are not multiplied: their sums stay 0.
        steps = (expert < num_experts).astype(jnp.int32) * pl.cdiv(width, depth)
        acc = lax.fori_loop(jnp.int32(0), steps, add, jnp.zeros((tile, columns), jnp.float32))
        mask = (row < end)[:, None] & (column < features)[None, :]
        plgpu.store(out_ref.at[row[:, None], column[None, :]], acc.astype(out_ref.dtype), mask=mask)
