"""Block sizes of the TPU kernels: explicit, else tuned for the device, else an estimate from the sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 2 << 20  # of one KV buffer: long enough a DMA to hide the next one's latency
BLOCK_TOKENS = 256  # longer ones need more registers than there are, and waste arithmetic on short sequences
TILE_ROWS = 128  # rows of q, heads of a group folded in, that are multiplied at once


@dataclass(frozen=True)
class Blocks:
    """Pages of a block of one-row items and of others, and rows of an item that are multiplied at once."""

    decode_pages: int
    mixed_pages: int
    tile_rows: int


def choose_blocks(pages: Any, num_kv_heads: int, head_dim: int, group: int, plan: Any) -> Blocks:
    """Block sizes for a pool and a plan."""
    page_size = pages.shape[2]
    page_bytes = pages.dtype.itemsize
    for n in pages.shape[2:]:
        page_bytes *= n
    most = max(1, min(plan.block_tables.shape[1], BLOCK_BYTES // page_bytes))
    multiple = max(1, 128 // page_size)

    def fit(tokens: int) -> int:
        wanted = max(1, min(most, tokens // page_size))
        return max(multiple, wanted // multiple * multiple)

    tile = max(1, TILE_ROWS // group)
    rows = 1 << (plan.q_block - 1).bit_length()
    return Blocks(fit(BLOCK_TOKENS), fit(BLOCK_TOKENS), max(16 // group, min(tile, rows)))
