"""The tiled order of block rows: the same bits as in the file, with 16 weight rows woven together for wide vectors.

A tile is ROWS neighbouring rows of a matrix. Block after block, it holds each number of the block for all rows: one load of 64
bytes fetches the bytes of four weights (or eight 4-bit weights) of every row, and a dot product needs no sum across lanes.
An array [L, N, R] keeps its shape: bits change places only within 16 rows, so N must be a multiple of 16.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 16
TILE_GROUP = 16
"""Activation rows that lie together, block by block."""
TOGETHER = 8
"""Activation rows that are multiplied together without AMX; where there are no more, a group has only their places."""
SEGMENTS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "q4_0": ((0, 2, 2), (2, 16, 4)),
    "q4_1": ((0, 4, 2), (4, 16, 4)),
    "q5_0": ((0, 2, 2), (2, 4, 4), (6, 16, 4)),
    "q5_1": ((0, 4, 2), (4, 4, 4), (8, 16, 4)),
    "q8_0": ((0, 2, 2), (2, 32, 4)),
    "iq4_nl": ((0, 2, 2), (2, 16, 4)),
    "mxfp4": ((0, 1, 1), (1, 16, 4)),
    "q2_k": ((80, 4, 2), (0, 16, 1), (16, 64, 4)),
    "q3_k": ((108, 2, 2), (96, 12, 4), (0, 32, 4), (32, 64, 4)),
    "q4_k": ((0, 4, 2), (4, 12, 4), (16, 128, 4)),
    "q5_k": ((0, 4, 2), (4, 12, 4), (16, 160, 4)),
    "q6_k": ((208, 2, 2), (192, 16, 1), (0, 64, 4), (128, 32, 4), (64, 64, 4), (160, 32, 4)),
    "iq4_xs": ((0, 4, 2), (4, 132, 4)),
}
"""Kinds that can be tiled: the parts of a block in the order that they have in a tile, each with its first byte, its number of
bytes and the bytes that stay together."""
FIFTH_BITS = {"q5_0": 2, "q5_1": 4}
"""Where a block has a bit of each of its 32 weights in one 32-bit number. In a tile, bit c of byte i is that of weight 4c + i."""


def can_tile(kind: str, rows: int) -> bool:
    """Checks whether matrices with this many rows of a kind can have the tiled order."""
    return kind in SEGMENTS and rows % ROWS == 0


@cache
def byte_order(kind: str, row_bytes: int) -> np.ndarray:
    """Returns [ROWS, R]: the place in a tile of byte j of row r."""
    from pallas_kernels.quant_matmul.formats import FORMATS

    size = FORMATS[kind].bytes
    place, r, at = np.empty((ROWS, size), np.int32), np.arange(ROWS)[:, None], 0
    for first, length, unit in SEGMENTS[kind]:
        number, byte = np.divmod(np.arange(length), unit)
        place[:, first : first + length] = at * ROWS + (number * ROWS + r) * unit + byte
        at += length
    blocks = np.arange(row_bytes // size, dtype=np.int32) * (size * ROWS)
    return (blocks[None, :, None] + place[:, None]).reshape(ROWS, row_bytes)


def tile_rows(blocks: np.ndarray, kind: str) -> None:
    """Brings the rows [..., N, R] into the tiled order, in place: the reference of `weave`, which loading calls.

    Raises:
        ValueError: this kind or number of rows cannot be tiled.
    """
    rows, row_bytes = blocks.shape[-2:]
    if not can_tile(kind, rows):
        raise ValueError(f"{rows} rows of {kind}: expected one of {', '.join(SEGMENTS)} and a multiple of {ROWS}")
    tiled = np.empty_like(blocks).reshape(-1, ROWS * row_bytes)
    tiled[:, byte_order(kind, row_bytes).reshape(-1)] = _turn_bits(blocks, kind, np).reshape(tiled.shape)
    blocks[...] = tiled.reshape(blocks.shape)


def untile(blocks: jax.Array, kind: str) -> jax.Array:
    """Returns tiled rows [..., N, R] in the file's order."""
    order = byte_order(kind, blocks.shape[-1]).reshape(-1)
    rows = jnp.take(blocks.reshape(*blocks.shape[:-2], -1, order.size), order, axis=-1).reshape(blocks.shape)
    return _turn_bits(rows, kind, jnp, back=True)


def take_rows(blocks: jax.Array, ids: jax.Array, kind: str) -> jax.Array:
    """Returns rows `ids` [T] of a tiled matrix [N, R], in the file's order: [T, R]. Ids outside are clipped."""
    rows, row_bytes = blocks.shape
    ids = jnp.clip(ids, 0, rows - 1)
    order = jnp.asarray(byte_order(kind, row_bytes))[ids % ROWS]
    return _turn_bits(blocks.reshape(rows // ROWS, -1)[(ids // ROWS)[:, None], order], kind, jnp, back=True)


def _turn_bits(rows, kind: str, xp, back: bool = False):
    """Gives the fifth bits of rows [..., R] their order in tiles, or `back` that of the file. `xp` is numpy or jax.numpy."""
    if kind not in FIFTH_BITS:
        return rows
    from pallas_kernels.quant_matmul.formats import FORMATS

    size, first = FORMATS[kind].bytes, FIFTH_BITS[kind]
    blocks = rows.reshape(*rows.shape[:-1], -1, size)
    bits = xp.unpackbits(blocks[..., first : first + 4], axis=-1, bitorder="little")
    shape = bits.shape
    bits = bits.reshape(*shape[:-1], 4, 8) if back else bits.reshape(*shape[:-1], 8, 4)
    turned = xp.packbits(bits.swapaxes(-1, -2).reshape(shape), axis=-1, bitorder="little")
    return xp.concatenate([blocks[..., :first], turned, blocks[..., first + 4 :]], axis=-1).reshape(rows.shape)
