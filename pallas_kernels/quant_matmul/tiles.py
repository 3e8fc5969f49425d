"""The tiled order of block rows: the same bytes as in the file, with 16 weight rows woven together for wide vectors.

A tile is ROWS neighbouring rows of a matrix. Block after block of 32 weights, it holds each 16-bit number of the block's head for
all rows, then each 4 bytes of the block's body for all rows: one load of 64 bytes fetches four weights (or four pairs of
4-bit weights) of every row, and a dot product needs no sum across lanes. An array [L, N, R] keeps its shape: bytes change places
only within 16 rows, so N must be a multiple of 16.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 16
TILE_GROUP = 8
"""Activation rows that the kernel for tiled rows takes together."""
HEADS = {"q4_0": 1, "q4_1": 2, "q8_0": 1}
"""Kinds that can be tiled, and the number of 16-bit numbers with which their blocks begin."""

CHUNK = 1 << 22  # bytes that are moved at a time


def can_tile(kind: str, rows: int) -> bool:
    """Checks whether matrices with this many rows of a kind can have the tiled order."""
    return kind in HEADS and rows % ROWS == 0


@cache
def byte_order(kind: str, row_bytes: int) -> np.ndarray:
    """Returns [ROWS, R]: the place in a tile of byte j of row r."""
    from pallas_kernels.quant_matmul.formats import FORMATS

    size, head = FORMATS[kind].bytes, 2 * HEADS[kind]
    block, j = np.divmod(np.arange(row_bytes), size)
    r = np.arange(ROWS)[:, None]
    in_head = j // 2 * 2 * ROWS + 2 * r + j % 2
    in_body = head * ROWS + (j - head) // 4 * 4 * ROWS + 4 * r + (j - head) % 4
    return (block * size * ROWS + np.where(j < head, in_head, in_body)).astype(np.int32)


def tile_rows(blocks: np.ndarray, kind: str) -> None:
    """Brings the rows [..., N, R] into the tiled order, in place.

    Raises:
        ValueError: this kind or number of rows cannot be tiled.
    """
    rows, row_bytes = blocks.shape[-2:]
    if not can_tile(kind, rows):
        raise ValueError(f"{rows} rows of {kind}: expected one of {', '.join(HEADS)} and a multiple of {ROWS}")
    source = np.empty(ROWS * row_bytes, np.intp)
    source[byte_order(kind, row_bytes)] = np.arange(ROWS * row_bytes).reshape(ROWS, row_bytes)
    tiles = blocks.reshape(-1, ROWS * row_bytes)
    step = max(1, CHUNK // tiles.shape[1])
    for start in range(0, len(tiles), step):
        tiles[start : start + step] = tiles[start : start + step].take(source, axis=1)


def untile(blocks: jax.Array, kind: str) -> jax.Array:
    """Returns tiled rows [..., N, R] in the file's order."""
    order = byte_order(kind, blocks.shape[-1]).reshape(-1)
    return jnp.take(blocks.reshape(*blocks.shape[:-2], -1, order.size), order, axis=-1).reshape(blocks.shape)


def take_rows(blocks: jax.Array, ids: jax.Array, kind: str) -> jax.Array:
    """Returns rows `ids` [T] of a tiled matrix [N, R], in the file's order: [T, R]. Ids outside are clipped."""
    rows, row_bytes = blocks.shape
    ids = jnp.clip(ids, 0, rows - 1)
    order = jnp.asarray(byte_order(kind, row_bytes))[ids % ROWS]
    return blocks.reshape(rows // ROWS, -1)[(ids // ROWS)[:, None], order]
