"""The beams of one request: they are computed in the same steps, share pages, and become those of the next step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from functools import partial

from llm_infer.decoding.beam import BeamSearch, Child
from llm_infer.kvcache.page_table import PageTable
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.plan import ScheduledRow
from llm_infer.scheduler.plan_builder import ShardPlan
from llm_infer.scheduler.request import Request, Sequence, Status, TokenEvent
from llm_infer.scheduler.step_result import StepResult
from llm_infer.scheduler.strategies.strategy import Strategy


class Beams(Strategy):
    """Searches with one sequence for each beam. The first computes the prompt alone; its result makes the others.

    Args:
        request: whose beams they are; its sequences are there.

    Attributes:
        search: decides which beams go on.
    """

    def __init__(self, request: Request) -> None:
        sampling, first = request.sampling, request.sequences[0]
        self.search = BeamSearch(
            request.width,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
            stop_ids=first.stop_ids,
            min_tokens=sampling.min_tokens,
            max_tokens=first.max_length - len(request.prompt),
        )

    def rows(self, sequence: Sequence, plan: ShardPlan) -> None:
        """Plans one token of every beam when the first of them is looked at and all are ready."""
        request = sequence.request
        if sequence.sample_index == 0 and _are_ready(request.members) and _make_room(request, plan):
            for beam in request.members:
                plan.add_row(beam, 1)

    def commit(self, row: ScheduledRow, drawn: SequenceOf[int], result: StepResult) -> None:
        """Lets the search go on when the results of all beams are here."""
        sequence = row.sequence
        result.offer_pages(sequence, row.start + row.count)
        if sequence.sample_index == 0:
            result.after_rows.append(partial(self._advance, sequence.request, result))

    def fork(self, first: Sequence, plan: ShardPlan) -> None:
        """Does nothing: what the other beams are follows from the result."""

    def needs_result(self, sequence: Sequence) -> bool:
        """Implements `Strategy`."""
        return True

    def num_joint(self, sequence: Sequence) -> int:
        """Implements `Strategy`: the last tokens of several beams are computed in one step."""
        return int(len(sequence.request.members) > 1)

    def pages_of_others(self, sequence: Sequence, page_size: int) -> list[list[int]] | None:
        """Implements `Strategy`: it is too early while pages of a beam are not computed, or not known to be.

        Beams return after a preemption one by one, so that each finds what those before it have computed.
        """
        best: list[list[int]] = []
        for other in sequence.request.members:
            if other is sequence or other.status is not Status.RUNNING:
                continue
            assert other.table is not None
            if other.in_flight or other.length - other.num_computed != 1:
                return None
            if other.num_cached_pages < other.num_computed // page_size:
                return None
            equal = _common_prefix(sequence.tokens, other.tokens)
            own = len(sequence.tokens) - 1 - self.num_joint(sequence)  # something is left for it to compute
            count = min(equal // page_size, own // page_size, other.num_cached_pages)
            if count > (len(best[0]) if best else 0):
                best = other.table.prefix(count) or best
        return best

    def _advance(self, request: Request, result: StepResult) -> None:
        """Moves the search on by one step, or gives out its results."""
        members = request.members
        children = self.search.advance([beam.output for beam in members], [result.candidates[beam] for beam in members])
        if children is not None:
            _reorder(result.books, request, children, result.next_step)
            return
        result.finish(request.sequences[0], "stop")
        for sequence, found in zip(request.sequences, self.search.results, strict=True):
            sequence.tokens = [*request.prompt, *found.tokens]
            sequence.finish_reason, sequence.score = found.finish_reason, found.score
            result.events += [TokenEvent(sequence, token, None) for token in found.tokens]
            result.events[-1].finish_reason = found.finish_reason


def _are_ready(beams: Iterable[Sequence]) -> bool:
    """Tells whether all have pages with everything but their last token, and no result is outstanding."""
    return all(
        beam.status is Status.RUNNING and not beam.in_flight and beam.length - beam.num_computed == 1 for beam in beams
    )


def _make_room(request: Request, plan: ShardPlan) -> bool:
    """Makes places for the next tokens of all beams; False if they had to give up their pages."""
    end = request.sequences[0].num_computed + 1
    tables = [beam.table for beam in request.members if beam.table is not None]
    # A beam that has returned after a preemption has had its place since then, but not in layers with a window.
    late, tables = [t for t in tables if t.length >= end > t.covered], [t for t in tables if t.length < end]
    while pages_needed(tables) + sum(table.pages_to(end) for table in late) > plan.num_available:
        if plan.take_pages().request is request:
            return False
    for table in (*tables, *late):
        plan.extend(table, end)
    return True


def pages_needed(tables: Iterable[PageTable]) -> int:
    """Returns the pages that `append(1)` on each of these tables, one after the other, allocates; all are equally long.

    Of the tables that share a partial last page all need a copy but the last, unless somebody else owns the page too.
    """
    needed, sharers, refcounts = 0, Counter[int](), {}
    for table in tables:
        if table.length % table.page_size == 0:
            needed += len(table.groups)
            continue
        for page, refcount in table.last_pages():
            sharers[page] += 1
            refcounts[page] = refcount
    return needed + sum(count - (refcounts[page] == count) for page, count in sharers.items())


def _reorder(books: Books, request: Request, children: SequenceOf[Child], step: int) -> None:
    """Makes the beams of a search those of the next step; pages of beams that die are given back at once.

    A beam that changes its place forks the page table of the beam that it extends. Beams without pages (preempted
    while their step ran) only change their tokens. `step` is the first in which the new beams are computed.
    """
    beams, running = request.sequences, request.sequences[0].status is Status.RUNNING
    tokens = [beam.tokens for beam in beams]
    parents = {child.parent for child in children}
    for place, beam in enumerate(beams):
        if place not in parents and beam.table is not None:
            books.drop_state(beam)
            beam.table.free()
    for place, child in enumerate(children):
        beam, parent = beams[place], beams[child.parent]
        if beam is not parent:
            beam.digests = list(parent.digests)
            if running:
                assert parent.table is not None
                beam.table = parent.table.fork()
                books.share_state(parent, beam)
                beam.num_computed, beam.num_cached_pages = parent.num_computed, parent.num_cached_pages
                beam.first_step = step
                if beam.status is not Status.RUNNING:
                    books.enter_slot(beam, parent.table.shard)
            elif not request.forked:
                beam.status = Status.PREEMPTED
                books.enqueue(beam)
        beam.tokens = [*tokens[child.parent], child.token]
    request.forked = True


def _common_prefix(a: list[int], b: list[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
