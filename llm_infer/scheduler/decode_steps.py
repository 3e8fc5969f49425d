"""Whether the next step may draw several tokens for each sequence without asking the host in between."""

from __future__ import annotations

from llm_infer.scheduler.books import Books
from llm_infer.scheduler.request import Sequence


def choose_steps(books: Books, wanted: int, *, speculating: bool) -> int:
    """`wanted` if every running sequence decodes, needs nothing from the host for so long and has the pages; else 1.

    Nobody loses pages for it, and nobody waits who could be admitted: where a slot is free and somebody waits for one,
    steps stay short.
    """
    if wanted == 1 or not any(books.running) or (books.waiting and any(books.free_slots)):
        return 1
    for shard, running in enumerate(books.running):
        pages = 0
        for sequence in running:
            steps = min(wanted, sequence.max_length - sequence.length)
            if steps <= 0:  # its last token is in flight
                continue
            if not _is_free(sequence, wanted, speculating):
                return 1
            table = sequence.table
            assert table is not None
            pages += table.pages_needed(sequence.num_computed + steps - table.length)
        if pages > books.allocator.num_available(shard):
            return 1
    return wanted


def _is_free(sequence: Sequence, steps: int, speculating: bool) -> bool:
    request, length = sequence.request, sequence.length
    if request.stepwise or request.beams is not None or length - sequence.num_computed != 1:
        return False
    if sequence.num_computed < len(request.prompt) or length - len(request.prompt) < request.min_tokens:
        return False
    return not (speculating and request.speculate) or (
        sequence.speculation is not None and sequence.speculation.rest >= steps
    )
