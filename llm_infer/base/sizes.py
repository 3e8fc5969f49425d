"""Sizes as people read them."""

from __future__ import annotations


def size(num_bytes: int) -> str:
    """Returns a number of bytes in decimal units, as hubs and file systems show it: "4.9 GB"."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
