"""The plan of a step while it is made: rows, and the pages for them, which sequences of a lower rank may have to give."""

from __future__ import annotations

from collections.abc import Iterable

from llm_infer.kvcache.page_table import PageTable
from llm_infer.kvcache.states import States
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.plan import ScheduledRow, StepPlan
from llm_infer.scheduler.request import Sequence, Status


class PlanBuilder:
    """What all shards of a step have in common, and the part of each.

    Args:
        books: where sequences and their pages are.
        budget: tokens of each shard.
        steps: tokens that are drawn one after the other.

    Attributes:
        shards: the part of each shard.
        admitted, preempted: see StepPlan.
        forked: sequences that got pages in this plan, to wait when it is made.
        num_preemptions: how often pages were taken from a sequence, or from the beams of a request.
    """

    def __init__(self, books: Books, budget: int, steps: int) -> None:
        self.books = books
        self.steps = steps
        self._budget = budget
        self.shards = [ShardPlan(self, shard, budget) for shard in range(len(books.running))]
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.forked: list[Sequence] = []
        self.num_preemptions = 0

    def build(self, index: int) -> StepPlan | None:
        """Returns the plan as the step with this index; None if it has no rows."""
        rows = tuple(tuple(shard.single + shard.longer) for shard in self.shards)
        if not any(rows):
            return None
        return StepPlan(
            index,
            rows,
            copies=tuple(tuple(shard.copies) for shard in self.shards),
            num_tokens=self._budget - min(shard.budget for shard in self.shards),
            num_steps=1 if self.steps == 1 else max(row.steps for row_of in rows for row in row_of),
            has_drafts=any(shard.num_drafts for shard in self.shards),
            admitted=tuple(self.admitted),
            preempted=tuple(self.preempted),
        )


class ShardPlan:
    """The part of one shard.

    Attributes:
        step: the plan of all shards.
        shard: which one it is.
        steps: as of the step.
        states: pages of states; None for models without.
        running: its running sequences.
        budget: tokens that may still be planned.
        single, longer: rows of one token, and of more.
        copies: see StepPlan.
        num_drafts: proposed tokens in the rows.
        short_of_pages: sequences were preempted.
    """

    __slots__ = (
        *("allocator", "books", "budget", "copies", "longer", "num_drafts", "running", "shard", "short_of_pages"),
        *("single", "states", "step", "steps"),
    )

    def __init__(self, step: PlanBuilder, shard: int, budget: int) -> None:
        self.step, self.shard, self.budget, self.steps = step, shard, budget, step.steps
        self.states = step.books.states
        self.books, self.allocator, self.running = step.books, step.books.allocator, step.books.running[shard]
        self.single: list[ScheduledRow] = []
        self.longer: list[ScheduledRow] = []
        self.copies: list[tuple[int, int]] = []
        self.num_drafts = 0
        self.short_of_pages = False

    @property
    def num_available(self) -> int:
        """Pages that can be had without taking any from a sequence."""
        return self.allocator.num_available(self.shard)

    def add_row(self, sequence: Sequence, count: int, drafts: tuple[int, ...] = (), steps: int = 1) -> None:
        """Plans the next `count` tokens of a sequence, behind them `drafts`; their places are there.

        With `steps` above 1 it draws so many tokens from them. What is drawn counts as on its way from now on.
        """
        start, in_flight = sequence.num_computed, sequence.in_flight
        samples = start + count == len(sequence.tokens) + in_flight
        count += len(drafts)
        self.budget -= count
        sequence.num_computed = start + count + steps - 1
        if samples:
            sequence.in_flight = in_flight + steps
            request = sequence.request
            if not request.forked:
                request.strategy.fork(sequence, self)
        states = (0, 0) if self.states is None else self._next_state(sequence, start, self.states)
        row = ScheduledRow(sequence, start, count, samples, in_flight > 0, drafts, steps, *states)
        (self.single if count == 1 else self.longer).append(row)

    def _next_state(self, sequence: Sequence, start: int, states: States) -> tuple[int, int]:
        """Chooses the pages from which a row reads its state and to which it writes it.

        The old state stays where it is for whoever shares it, and as a snapshot behind a full page of tokens if there is a page
        to spare. No row of a step writes what another one reads.
        """
        shard, allocator, old = self.shard, states.allocator, sequence.state
        if old is None:
            sequence.state = self._page_for_state(states)
            return 0, sequence.state
        wanted = self.books.prefix_cache is not None and start % self.books.page_size == 0
        if allocator.refcount(shard, old) > 1 or allocator.is_pinned(shard, old):
            sequence.state = self._page_for_state(states)
        elif wanted and allocator.num_available(shard) > 0:
            (sequence.state,) = allocator.allocate(shard, 1)
        else:
            return old, old
        allocator.pin(shard, old)
        if wanted:
            sequence.snapshots.append((start, old))
        else:
            allocator.release(shard, (old,))
        return old, sequence.state

    def _page_for_state(self, states: States) -> int:
        """Returns a page for a state. There are two for each running sequence; what else holds some gives them up."""
        shard, allocator, books = self.shard, states.allocator, self.books
        while not allocator.num_available(shard):
            holder = next((each for each in reversed(self.running) if each.snapshots), None)
            if holder is not None:
                allocator.release(shard, (holder.snapshots.pop()[1],))
            else:
                books.unpark(books.parked[shard][-1])
        return allocator.allocate(shard, 1)[0]

    def make_room(self, sequence: Sequence) -> bool:
        """Makes a place for the next token of a running sequence; False if it had to give up its own pages."""
        table = sequence.table
        assert table is not None
        end = sequence.num_computed + 1
        # The first: its last prompt token, which may have its place since admission.
        if table.covered >= end or table.append_in_place():
            return True
        while table.pages_to(end) > self.num_available:
            if self.take_pages() is sequence:
                return False
        self.extend(table, end)
        return True

    def chunk(self, sequence: Sequence, count: int) -> int:
        """Makes places for up to `count` tokens of a prompt, fewer where pages are short, and returns for how many.

        Only layers with a window have none yet. Nobody gives up pages for them: those before them may be planned already.
        """
        table, start = sequence.table, sequence.num_computed
        assert table is not None
        while count and table.pages_to(start + count) > self.num_available:
            count //= 2
            self.short_of_pages = True
        if count:
            self.extend(table, start + count)
        return count

    def extend(self, table: PageTable, end: int) -> None:
        """Makes places up to position `end`; the pages for them are there."""
        self.note_copies(table.extend(end))

    def note_copies(self, copies: Iterable[tuple[int, int]]) -> None:
        """Plans copies of pages."""
        for source, destination in copies:
            self.allocator.pin(self.shard, source)  # it must not become the destination of another copy of this step
            self.copies.append((source, destination))

    def take_pages(self) -> Sequence:
        """Has the sequence of the lowest rank with pages give them up, with all its group, and returns it."""
        books, step = self.books, self.step
        victim = max(self.running[-1:] + books.parked[self.shard][-1:], key=lambda member: member.rank)
        if victim.status is not Status.RUNNING:
            books.unpark(victim)
            return victim
        for member in victim.group:
            if member.status is Status.RUNNING:
                books.preempt(member)
                step.preempted.append(member)
        victim.request.num_preemptions += 1
        step.num_preemptions += 1
        self.short_of_pages = True
        return victim
