"""Several tokens for each sequence in one step, drawn one after the other without the host: when, and which rows."""

from __future__ import annotations

from llm_infer.scheduler.books import Books
from llm_infer.scheduler.plan_builder import ShardPlan
from llm_infer.scheduler.request import Sequence


def choose_steps(books: Books, wanted: int) -> int:
    """Returns `wanted` if every running sequence can go on for so long without the host and has the pages; else 1.

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
            if not sequence.request.strategy.goes_on(sequence, wanted):
                return 1
            table = sequence.table
            assert table is not None
            pages += table.pages_to(sequence.num_computed + steps)
        if pages > books.allocator.num_available(shard):
            return 1
    return wanted


def add_steps(sequence: Sequence, plan: ShardPlan) -> int:
    """Plans the steps of a sequence, fewer where it would become too long, and returns how many.

    `choose_steps` has seen that pages are there for all of them.
    """
    table, steps = sequence.table, min(plan.steps, sequence.max_length - sequence.length)
    assert table is not None
    plan.extend(table, sequence.num_computed + steps)
    plan.add_row(sequence, 1, steps=steps)
    return steps
