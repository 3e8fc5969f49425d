"""The width of a token in pages with scales of their own, for the layouts and for the native kernels that read them."""

SCALE_BYTES = 4
SMALLEST_SCALE = 2.0**-126
"""Numbers with a smaller scale are stored as zeros: its inverse would overflow."""


def page_width(head_dim: int, pool_dtype: str) -> int:
    """Returns the length of the plain layout's last axis."""
    return head_dim + SCALE_BYTES if pool_dtype == "uint8" else head_dim
