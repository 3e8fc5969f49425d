"""Quantised matmul by XLA: it dequantises the layer's matrix into scratch memory, then runs XLA's dot. Good for many rows.

It is the reference's own code; the difference is when `dispatch` picks it.
"""

from __future__ import annotations

from pallas_kernels.dispatch import Case
from pallas_kernels.quant_matmul.reference import quant_matmul

__all__ = ["quant_matmul", "why_not"]


def why_not(case: Case) -> str | None:
    """Refuses nothing: it runs everywhere."""
    del case
    return None
