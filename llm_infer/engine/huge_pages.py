"""Large arrays in memory pages of 2 MiB on CPUs: looking up pages of 4 KiB takes up to a quarter of attention's time."""

from __future__ import annotations

import ctypes
import mmap
import sys

import jax

HUGE = 2 << 20
"""Bytes of a huge page of x86-64, and of arm64 with pages of 4 KiB."""


def empty_in_huge_pages(array: jax.Array) -> int:
    """Asks the system for huge pages under an array of zeros that nothing else reads, on CPUs under Linux.

    Its memory is given back, and comes again, as zeros and now in huge pages, when it is first used.

    Returns:
        The bytes that this could be done for; 0 on other systems and devices.
    """
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done = 0
    for shard in jax.block_until_ready(array).addressable_shards:
        if shard.device.platform != "cpu":
            continue
        start = shard.data.unsafe_buffer_pointer()
        first, last = -(-start // HUGE) * HUGE, (start + shard.data.nbytes) // HUGE * HUGE
        if first < last and madvise(first, last - first, mmap.MADV_HUGEPAGE) == 0:
            done += last - first if madvise(first, last - first, mmap.MADV_DONTNEED) == 0 else 0
    return done
