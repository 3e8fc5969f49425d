"""Verifies that the scheduler's lists, slots and pages agree; run by tests and by the engine's debug switch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llm_infer.kvcache.page_allocator import NULL_PAGE, InvariantError
from llm_infer.kvcache.states import States
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.plan import StepPlan
from llm_infer.scheduler.request import Request, Sequence, Status


def check_in_flight(submitted: Iterable[StepPlan], requests: Iterable[Request]) -> None:
    """Checks that every sequence expects as many tokens as the submitted steps draw for it; else InvariantError."""
    drawn = Counter[Sequence]()
    for row in (row for plan in submitted for rows in plan.rows for row in rows if row.samples):
        drawn[row.sequence] += row.steps
    for request in requests:
        for sequence in request.sequences:
            if sequence.in_flight != drawn[sequence]:
                raise InvariantError(f"{sequence}: submitted steps draw {drawn[sequence]} tokens for it")


def check_books(books: Books, requests: Iterable[Request]) -> None:
    """Checks that lists, slots and pages agree; else InvariantError, with the two sides that differ."""
    requests = list(requests)
    for shard, (running, parked) in enumerate(zip(books.running, books.parked, strict=True)):
        spare = [slot for request in requests if request.shard == shard for slot in request.spare_slots]
        slots = sorted(books.free_slots[shard] + spare + [s.slot for s in running if s.slot is not None])
        if slots != list(range(books.num_slots)):
            raise InvariantError(f"shard {shard}: free and owned slots {slots}, expected 0 … {books.num_slots - 1}")
        holding = [s for s in books.waiting if s.table is not None and s.table.shard == shard]
        if parked != holding:
            raise InvariantError(f"shard {shard}: parked {parked}, waiting with pages {holding}")
    for ranked in (books.waiting, *books.running):
        if sorted(ranked, key=lambda s: s.rank) != ranked:
            raise InvariantError(f"out of the order of rank: {ranked}")
    for request in requests:
        for sequence in request.sequences:
            _check_sequence(books, sequence)
        shards = {s.table.shard for s in request.sequences if s.table is not None}
        if shards != (set() if request.shard is None else {request.shard}):
            raise InvariantError(f"request {request.request_id!r} is on shard {request.shard}, its pages on {shards}")
    owners = [
        [s.table.held() for s in (*running, *parked) if s.table is not None]
        for running, parked in zip(books.running, books.parked, strict=True)
    ]
    if books.prefix_cache is not None:
        for shard, lists in enumerate(owners):
            lists.append(books.prefix_cache.pages(shard))
    books.allocator.check(owners)
    if books.states is not None:
        _check_states(books, books.states)


def _check_states(books: Books, states: States) -> None:
    owners = []
    for shard, (running, parked) in enumerate(zip(books.running, books.parked, strict=True)):
        holders = [*running, *parked]
        for sequence in holders:
            if (sequence.state is None) != (sequence.num_computed == 0):
                raise InvariantError(f"{sequence} has the state {sequence.state}")
        held = [[page for _, page in s.snapshots] + ([] if s.state is None else [s.state]) for s in holders]
        owners.append([*held, states.pages(shard)])
    states.allocator.check(owners)


def _check_sequence(books: Books, sequence: Sequence) -> None:
    running = sum(sequence in members for members in books.running)
    waiting = books.waiting.count(sequence)
    unborn = sequence.sample_index > 0 and not sequence.request.forked
    expected = {
        Status.RUNNING: (1, 0),
        Status.WAITING: (0, 0 if unborn else 1),
        Status.PREEMPTED: (0, 1),
        Status.FINISHED: (0, 0),
    }[sequence.status]
    if (running, waiting) != expected:
        raise InvariantError(f"{sequence} is {running} times running and {waiting} times waiting, expected {expected}")
    if (sequence.slot is not None) != bool(running):
        raise InvariantError(f"{sequence} has slot {sequence.slot}")
    table = sequence.table
    if table is None:
        if sequence.num_computed or running:
            raise InvariantError(f"{sequence} has no pages")
    elif [len(pages) for pages in table.groups] != [-(-end // table.page_size) for end in table.ends()]:
        raise InvariantError(f"{sequence}: pages {table.groups} of {table.page_size} for places up to {table.ends()}")
    elif any(NULL_PAGE in pages for pages, window in zip(table.groups, table.windows, strict=True) if window is None):
        raise InvariantError(f"{sequence} has lost pages: {table.groups}")
    elif sequence.num_computed > table.length or sequence.num_computed >= sequence.length + sequence.num_drafts:
        raise InvariantError(f"{sequence} has {table.length} places, and one token at least is not computed")
