"""The weight formats of quantised matmul: geometry and layout, one table for every backend.

GGUF blocks: a row of K weights has K / elements blocks, one after the other. Layouts are those of ggml's `block_q*` structs
(https://github.com/ggml-org/llama.cpp, ggml-common.h), little-endian; no padding. Scales are float16; that of mxfp4 is a byte, an
exponent of two. The dense formats f32, f16 and bf16 are ordinary arrays [L, N, K] of these numbers (a "block" is then
just 32 of them).
"""

from __future__ import annotations

from dataclasses import dataclass

_ITEM_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}

# The weights that four bits stand for where these are not the weights themselves.
VALUES = {
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),  # twice the numbers of FP4 (E2M1)
}
VALUES["iq4_xs"] = VALUES["iq4_nl"]


@dataclass(frozen=True)
class BlockFormat:
    """Geometry of a block: `elements` weights in `bytes` bytes. `dtype` is that of the array that holds the rows."""

    kind: str
    elements: int
    bytes: int
    dtype: str = "uint8"

    @property
    def item_bytes(self) -> int:
        """The bytes of one item of the array."""
        return _ITEM_BYTES[self.dtype]

    def row_items(self, k: int) -> int:
        """Returns the items of the array in a row of k weights: R, bytes for GGUF blocks and K for dense formats.

        Raises:
            ValueError: k is not a whole number of blocks.
        """
        if k % self.elements:
            raise ValueError(f"{self.kind}: row of {k} weights is not a multiple of the block of {self.elements}")
        return k // self.elements * self.bytes // self.item_bytes

    def row_elements(self, items: int) -> int:
        """Returns the weights in a row of this many items.

        Raises:
            ValueError: the items are not a whole number of blocks.
        """
        if items * self.item_bytes % self.bytes:
            raise ValueError(
                f"{self.kind}: row of {items} {self.dtype} is not a multiple of the block of {self.bytes} bytes"
            )
        return items * self.item_bytes // self.bytes * self.elements


FORMATS = {
    fmt.kind: fmt
    for fmt in (
        BlockFormat("q4_0", 32, 18),
        BlockFormat("q4_1", 32, 20),
        BlockFormat("q5_0", 32, 22),
        BlockFormat("q5_1", 32, 24),
        BlockFormat("q8_0", 32, 34),
        BlockFormat("iq4_nl", 32, 18),
        BlockFormat("mxfp4", 32, 17),
        BlockFormat("q2_k", 256, 84),
        BlockFormat("q3_k", 256, 110),
        BlockFormat("q4_k", 256, 144),
        BlockFormat("q5_k", 256, 176),
        BlockFormat("q6_k", 256, 210),
        BlockFormat("iq4_xs", 256, 136),
        BlockFormat("f32", 32, 128, "float32"),
        BlockFormat("f16", 32, 64, "float16"),
        BlockFormat("bf16", 32, 64, "bfloat16"),
    )
}
DENSE = {fmt.dtype: kind for kind, fmt in FORMATS.items() if fmt.dtype != "uint8"}
"""Type of plain numbers → their kind."""
