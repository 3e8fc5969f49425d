"""Block sizes of the TPU kernel: explicit, else tuned for the device, else those that did best in compiled schedules.

The estimate is from the bundles of v5e and v6e (`llm-infer bench kernels`): longer decode blocks and larger tiles spill
registers, shorter ones leave the matrix units waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels import tuned

DECODE_TOKENS, MIXED_TOKENS = 256, 512  # of a block
BLOCK_BYTES = 4 << 20  # of one of the two KV buffers, at most
TILE_ROWS = 128  # rows of q, heads of a group folded in, that are multiplied at once


@dataclass(frozen=True)
class Blocks:
    """Pages of a block of one-row items and of others, and rows of an item that are multiplied at once."""

    decode_pages: int
    mixed_pages: int
    tile_rows: int


def choose_blocks(device_kind: str, pages: Any, head_dim: int, group: int, q_block: int) -> Blocks:
    """Chooses block sizes for a pool [L, P, C, W, K, Dp], `group` rows of q per KV head and items of up to `q_block` rows.

    Raises:
        ValueError: a tuned block size is one that a block of tokens cannot have (see `check_blocks`).
    """
    page_size, token_bytes = pages.shape[2], pages.dtype.itemsize
    for n in pages.shape[3:]:
        token_bytes *= n

    def fit(tokens: int) -> int:
        """Returns pages of about this many tokens: whole registers of 128 scores, and no more than a buffer takes."""
        while tokens > 128 and tokens * token_bytes > BLOCK_BYTES:
            tokens //= 2
        return max(1, max(tokens, 128) // page_size)

    rows = 1 << (q_block - 1).bit_length()
    tile = max(16 // group, 1, min(TILE_ROWS // group, rows))
    measured = tuned.block_sizes(device_kind, "paged_attention").get(f"{pages.dtype.name}-{head_dim}", {})
    sizes = {"decode_pages": fit(DECODE_TOKENS), "mixed_pages": fit(MIXED_TOKENS), "tile_rows": tile, **measured}
    blocks = Blocks(**sizes)
    check_blocks(blocks, page_size, group)
    return blocks


def check_blocks(blocks: Blocks, page_size: int, group: int) -> None:
    """Raises ValueError for sizes that the kernel cannot take."""
    for name in ("decode_pages", "mixed_pages"):
        pages = getattr(blocks, name)
        if pages < 1 or pages * page_size % 128:
            raise ValueError(
                f"blocks.{name} is {pages}, expected blocks of multiples of 128 tokens: pages of {page_size} in multiples of "
                f"{max(1, 128 // page_size)}"
            )
    if blocks.tile_rows < 1 or blocks.tile_rows * group % 16:
        raise ValueError(
            f"blocks.tile_rows is {blocks.tile_rows}, expected a multiple of {max(1, 16 // group)} (16 rows of q with the "
            f"{group} heads of a group)"
        )
