"""How many pages fit a device beside everything else: measured on the compiled program, not guessed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import jax

from llm_infer.errors import CapacityError

UTILIZATION = 0.9
"""Share of an accelerator's memory that weights, pages and steps may take where nothing is said."""


def device_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program needs on each device while it runs: arguments, temporaries, results that are not in place of
    an argument, and code."""
    found = compiled.memory_analysis()
    assert found is not None, "every backend of JAX says what its programs take"
    in_and_out = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return in_and_out + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def memory_limit(devices: Iterable[jax.Device]) -> int:
    """Bytes of the smallest device: what its allocator may hand out; of CPU devices, an equal share of the machine's."""
    devices = list(devices)
    stats = [device.memory_stats() for device in devices]
    limits = [each["bytes_limit"] for each in stats if each and "bytes_limit" in each]
    if limits:
        return min(limits)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def pages_that_fit(
    measure: Callable[[int], int | None], *, limit: int, utilization: float, weights: int, page_bytes: int, most: int
) -> int:
    """The largest number of pages with which the largest program stays within `limit` × `utilization`.

    What a program takes besides weights and pages is known once it is compiled, so one is: with as many pages as the
    weights leave room for, and then as many fewer as it is over. Where a program copies some pages, each page taken
    away frees more than its own size, so the result is still within.

    Args:
        measure: bytes on a device of the program with this number of pages; None where the compiler refuses it.
        limit: bytes of a device.
        utilization: share of them that may be used.
        weights: bytes of the parameters on a device.
        page_bytes: of one page on a device.
        most: pages that are of any use.

    Raises:
        CapacityError: fewer than two pages fit (page 0 is never used by a sequence).
    """
    budget = int(limit * utilization)
    above = pages = min(most, (budget - weights) // page_bytes)
    taken = None
    while pages >= 2 and (taken := measure(pages)) is None:
        above, pages = pages - 1, pages // 2
    if taken is not None:
        spare = budget - taken
        if spare < 0:
            pages += spare // page_bytes  # rounds down: away from zero
        else:  # what else grows with the pages grows with them at most in proportion
            grows = page_bytes + max(0, taken - weights - pages * page_bytes) // pages
            pages = min(above, pages + spare // grows)
    if pages < 2:
        beside = "" if taken is None else f", the largest step takes {taken / 1e9:.2f} GB with them"
        raise CapacityError(
            f"memory_utilization={utilization} of {limit / 1e9:.2f} GB is {budget / 1e9:.2f} GB a device; the weights "
            f"take {weights / 1e9:.2f} GB{beside}, which leaves {max(0, pages)} pages of {page_bytes / 1e6:.2f} MB and at "
            "least 2 are needed: raise memory_utilization or tensor_parallel_size, or lower max_num_batched_tokens or "
            "max_num_seqs"
        )
    return pages
