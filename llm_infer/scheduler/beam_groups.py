"""The beams of one request as a group: they are computed in the same steps, and a beam that returns shares with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llm_infer.kvcache.page_table import PageTable
from llm_infer.scheduler.request import Request, Sequence, Status


def is_ready(request: Request) -> bool:
    """All beams have pages with everything but their last token, and no result is outstanding."""
    return all(
        beam.status is Status.RUNNING and not beam.in_flight and beam.length - beam.num_computed == 1
        for beam in request.members
    )


def pages_needed(tables: Iterable[PageTable]) -> int:
    """Pages that `append(1)` on each of these tables, one after the other, allocates; all hold the same number of tokens.

    Of the tables that share a partial last page all need a copy but the last, unless somebody else owns the page too.
    """
    needed, sharers, refcounts = 0, Counter[int](), {}
    for table in tables:
        if table.length % table.page_size == 0:
            needed += 1
        else:
            sharers[table.pages[-1]] += 1
            refcounts[table.pages[-1]] = table.refcount_of_last()
    return needed + sum(count - (refcounts[page] == count) for page, count in sharers.items())


def most_pages(num_prompt: int, length: int, width: int, page_size: int) -> int:
    """Pages of a group of `length` tokens each at most: the beams may share nothing but the prompt."""
    # The page with the last prompt token is counted for each: it may be computed again by a beam that returns.
    shared = (num_prompt - 1) // page_size
    return shared + width * (-(-length // page_size) - shared)


def pages_of_siblings(sequence: Sequence, page_size: int) -> list[int] | None:
    """Full computed pages that a beam without pages can share with another of its request; the longest such run.

    Beams return after a preemption one by one, so that each finds what those before it have computed.

    Returns:
        None while a beam of the request is not settled: its pages are not all computed, or not known to be.
    """
    best: list[int] = []
    for other in sequence.request.members:
        if other is sequence or other.status is not Status.RUNNING:
            continue
        assert other.table is not None
        if other.in_flight or other.length - other.num_computed != 1:
            return None
        if other.num_cached_pages < other.num_computed // page_size:
            return None
        count = min(_common_prefix(sequence.tokens, other.tokens) // page_size, last_shared_page(sequence, page_size))
        count = min(count, other.num_cached_pages)
        if count > len(best):
            best = other.table.pages[:count]
    return best


def last_shared_page(sequence: Sequence, page_size: int) -> int:
    """Most pages that a sequence can take from others when it gets its own: something is left for it to compute.

    That is the last token; for one beam of several, which are computed together, also the token before.
    """
    left = 2 if len(sequence.request.members) > 1 and sequence.request.beams is not None else 1
    return (len(sequence.tokens) - left) // page_size


def prefill_end(sequence: Sequence) -> int:
    """Up to where a sequence is computed on its own: of several beams the last tokens are computed in one step."""
    together = sequence.request.beams is not None and len(sequence.request.members) > 1
    return sequence.length - 1 if together else sequence.length


def _common_prefix(a: list[int], b: list[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
