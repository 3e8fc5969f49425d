"""Which arrays Pallas' Triton lowering can address: it counts offsets in 32 bits for arrays of up to 4 GiB, and they have a sign.

So in arrays of 8-bit numbers between 2 and 4 GiB the upper half lies at negative offsets (an illegal access when run). Wider
numbers are fewer than 2^31 in 4 GiB, and for larger arrays offsets have 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST = 1 << 31
"""Bytes from which on an array of 8-bit numbers cannot be addressed …"""
LAST = 1 << 32
"""… to those up to which it cannot."""


def why_not_offsets(shape: Sequence[int], itemsize: int) -> str | None:
    """Says why an array cannot be addressed; None where it can."""
    size = math.prod(shape)
    if itemsize > 1 or not FIRST < size <= LAST:
        return None
    return f"cannot address arrays of 8-bit numbers between 2 and 4 GiB, found {size / (1 << 30):.2f} GiB"
