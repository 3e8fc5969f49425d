"""Continuous batching: decides, step by step, which tokens of which sequences the device computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from llm_infer.config import SchedulerConfig
from llm_infer.errors import RequestError
from llm_infer.kvcache.page_table import PageTable
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.invariants import check_books, check_in_flight
from llm_infer.scheduler.placement import Placement
from llm_infer.scheduler.plan import ScheduledRow, StepPlan
from llm_infer.scheduler.request import Request, Sequence, Status, TokenEvent


class _Draft:
    """The plan of a step while it is made: lists with one entry per shard, then lists over all shards."""

    def __init__(self, num_shards: int, budget: int) -> None:
        self.budget = [budget] * num_shards
        self.single: list[list[ScheduledRow]] = [[] for _ in range(num_shards)]
        self.longer: list[list[ScheduledRow]] = [[] for _ in range(num_shards)]
        self.copies: list[list[tuple[int, int]]] = [[] for _ in range(num_shards)]
        self.short_of_pages = [False] * num_shards
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.forked: list[Sequence] = []


class Scheduler:
    """Turns requests into steps.

    A step takes, per shard and under the token budget: one token of every running sequence that decodes, then chunks of
    running prefills, then waiting sequences in the order of their rank (first come first served, or by priority). A
    sequence is admitted when pages for all its tokens are there and enough stay free for the others to grow
    (Placement). It gets those pages at once, so only decoding can run short of them; then the sequence of the lowest
    rank on the shard gives up its pages and computes its tokens again later. The sequence of the highest rank is never
    preempted for another, so every request ends.

    Of n parallel samples the first prefills the prompt alone; then the others fork its page table and wait, sharing its
    pages, until they are admitted to compute the last prompt token again and draw from it.

    `schedule()` may be called before the previous plan is committed (the host prepares a step while the device runs the
    one before); plans are committed in their order, and at most one is outstanding when the next is made. Pages and
    slots that a commit, an abort or a preemption gives back are safe to use in the next plan although a submitted step
    may still write to them, because the device runs the steps in order. Pages in the prefix cache are never written:
    such a late write lies behind the last token that was committed, and only pages full of committed tokens get there.

    Args:
        config: limits and policy.
        num_pages: pages of one shard, including the null page.
        page_size: tokens in a page.
        max_model_len: longest sequence in tokens.
        num_shards: data-parallel shards.
        enable_prefix_caching: keep and find full pages by their tokens.
        clock: current time in seconds.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        num_shards: int = 1,
        enable_prefix_caching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.page_size = page_size
        self.max_model_len = max_model_len
        self.num_shards = num_shards
        self.books = Books(
            num_pages=num_pages,
            page_size=page_size,
            num_shards=num_shards,
            num_slots=config.max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.allocator = self.books.allocator
        self.prefix_cache = self.books.prefix_cache
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.num_copied_pages = 0
        self._placement = Placement(self.books, int(config.watermark * self.allocator.num_usable))
        self._submitted: deque[StepPlan] = deque()
        self._num_arrived = 0
        self._num_steps = 0
        self._clock = clock

    @property
    def has_unfinished(self) -> bool:
        """There are requests that have not ended."""
        return bool(self.requests)

    @property
    def num_running(self) -> int:
        """Sequences that own a slot."""
        return sum(map(len, self.books.running))

    @property
    def num_waiting(self) -> int:
        """Sequences that wait to be admitted."""
        return len(self.books.waiting)

    def usage(self, shard: int = 0) -> float:
        """Share of the shard's pages that cannot be handed out now."""
        return 1 - self.allocator.num_available(shard) / self.allocator.num_usable

    def check(self) -> None:
        """Verifies every invariant of sequences, slots and pages (slow); raises InvariantError."""
        check_books(self.books, self.requests.values())
        check_in_flight(self._submitted, self.requests.values())

    # ------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: its id is in use, or it can never fit the context or the pages.
        """
        length = len(request.prompt)
        limit = self.max_model_len
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use by an unfinished request")
        if length >= limit:
            raise RequestError(
                f"the prompt has {length} tokens, the context holds {limit} and one must be left for the output: "
                "shorten the prompt or raise max_model_len"
            )
        if request.max_tokens is not None:
            limit = min(limit, length + request.max_tokens)
        # The last token is drawn but its K/V are never computed.
        needed = -(-(limit - 1) // self.page_size)
        if needed > self.allocator.num_usable:
            raise RequestError(
                f"the request can grow to {limit} tokens, which need {needed} pages of {self.page_size} tokens; there "
                f"are {self.allocator.num_usable}: raise num_pages or kv_cache_memory, or lower "
                "max_tokens or max_model_len"
            )
        request.arrival = self._num_arrived
        request.arrival_time = self._clock()
        self._num_arrived += 1
        first = request.priority if self.config.policy == "priority" else 0
        request.sequences = [Sequence(request, i, (first, request.arrival, i), limit) for i in range(request.n)]
        self.requests[request.request_id] = request
        self.books.enqueue(request.sequences[0])

    def abort(self, request_id: str) -> bool:
        """Ends a request at once; tokens in flight are dropped when they come. False if there is none of that id."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for sequence in reversed(request.sequences):  # the first last: while it lives, the others wait for it
            self.finish(sequence, "abort")
        return True

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends one sequence, for example at a stop string. No effect if it has ended."""
        if sequence.status is Status.FINISHED:
            return
        request = sequence.request
        self.books.end(sequence)
        sequence.finish_reason = reason
        if sequence.sample_index == 0 and not request.forked:  # nobody is left whom the other samples could fork
            request.forked = True
            for other in request.sequences[1:]:
                if other.status is Status.WAITING:
                    self.books.enqueue(other)
        if request.finished:
            del self.requests[request.request_id]
            request.finish_time = self._clock()

    # ------------------------------------------------------------------ planning

    def schedule(self) -> StepPlan | None:
        """The next step, to be submitted to the device at once; None if nothing can be done before a commit or an add.

        Rows that sample count as drawn from now on, all rows as computed. It is None only while a step is outstanding
        or no request is unfinished.
        """
        if len(self._submitted) > 1:
            raise RuntimeError("two submitted steps are not committed: commit the first before the next is planned")
        draft = _Draft(self.num_shards, self.config.max_num_batched_tokens)
        for shard in range(self.num_shards):
            self._schedule_running(shard, draft)
        self._admit_waiting(draft)
        for sequence in draft.forked:  # only now: the step that computes the prompt comes before the forks' first
            self.books.enqueue(sequence)
        self.allocator.unpin_all()
        rows = tuple(tuple(single + longer) for single, longer in zip(draft.single, draft.longer, strict=True))
        if not any(rows):
            return None
        copies = tuple(map(tuple, draft.copies))
        plan = StepPlan(self._num_steps, rows, copies, tuple(draft.admitted), tuple(draft.preempted))
        self._num_steps += 1
        self._submitted.append(plan)
        return plan

    def _schedule_running(self, shard: int, draft: _Draft) -> None:
        """Decodes in the order of rank, so that a victim (always of a lower rank) is not planned yet; then prefills."""
        prefilling = []
        for sequence in tuple(self.books.running[shard]):
            length = len(sequence.tokens) + sequence.in_flight
            # Not running any more: preempted for one before it. Long enough: its last token is in flight.
            if sequence.status is not Status.RUNNING or length >= sequence.max_length:
                continue
            if length - sequence.num_computed > 1:
                prefilling.append(sequence)
            elif self._make_room(sequence, shard, draft):
                self._plan_row(sequence, shard, 1, draft)
        for sequence in prefilling:
            if sequence.status is Status.RUNNING and draft.budget[shard]:
                left = sequence.length - sequence.num_computed
                self._plan_row(sequence, shard, min(left, draft.budget[shard]), draft)

    def _plan_row(self, sequence: Sequence, shard: int, count: int, draft: _Draft) -> None:
        start = sequence.num_computed
        samples = start + count == len(sequence.tokens) + sequence.in_flight
        rows = draft.single[shard] if count == 1 else draft.longer[shard]
        rows.append(ScheduledRow(sequence, start, count, samples, sequence.in_flight > 0))
        draft.budget[shard] -= count
        sequence.num_computed = start + count
        if samples:
            sequence.in_flight += 1
            if not sequence.request.forked:
                self._fork(sequence, draft)

    def _fork(self, parent: Sequence, draft: _Draft) -> None:
        parent.request.forked = True
        for child in parent.request.sequences[1:]:
            if child.status is Status.WAITING:
                self.books.fork(parent, child)
                draft.forked.append(child)

    def _make_room(self, sequence: Sequence, shard: int, draft: _Draft) -> bool:
        """A place for the next token of a running sequence; False if the sequence itself had to give up its pages."""
        table, books = sequence.table, self.books
        assert table is not None
        # The first: its last prompt token, which has its place since admission.
        if table.length > sequence.num_computed or table.append_in_place():
            return True
        while table.pages_needed(1) > self.allocator.num_available(shard):
            victim = max(books.running[shard][-1:] + books.parked[shard][-1:], key=lambda member: member.rank)
            if victim.status is Status.RUNNING:
                books.preempt(victim)
                victim.request.num_preemptions += 1
                self.num_preemptions += 1
                draft.preempted.append(victim)
                draft.short_of_pages[shard] = True
            else:
                books.unpark(victim)
            if victim is sequence:
                return False
        self._append(table, 1, draft)
        return True

    def _append(self, table: PageTable, count: int, draft: _Draft) -> None:
        for source, destination in table.append(count):
            self.allocator.pin(table.shard, source)  # it must not become the destination of another copy of this step
            draft.copies[table.shard].append((source, destination))
            self.num_copied_pages += 1

    def _admit_waiting(self, draft: _Draft) -> None:
        """Admits in the order of rank. Nobody overtakes on a shard where a sequence of a higher rank did not fit."""
        books, all_shards = self.books, range(self.num_shards)
        # Right after a preemption, pages that become free are for those who run.
        shut = {shard for shard in all_shards if draft.short_of_pages[shard] and books.running[shard]}
        index = 0
        while index < len(books.waiting):
            shut.update(shard for shard in all_shards if not books.free_slots[shard] or not draft.budget[shard])
            if len(shut) == self.num_shards:
                return
            sequence = books.waiting[index]
            bound = sequence.request.shard
            shards = set(all_shards if bound is None else (bound,)) - shut
            # What the outstanding step did for a sequence that has just been preempted is not committed yet.
            preempted = sequence in draft.preempted
            place = None if preempted else self._placement.find(sequence, shards)
            if place is not None:
                self._admit(sequence, *place, draft)
            elif preempted or not self._unpark_idle(shards):
                shut |= shards
                index += 1

    def _unpark_idle(self, shards: set[int]) -> bool:
        """Where nothing runs, nothing gives back pages: there the last of the waiting forks must."""
        for shard in shards:
            if self.books.parked[shard] and not self.books.running[shard]:
                self.books.unpark(self.books.parked[shard][-1])
                return True
        return False

    def _admit(self, sequence: Sequence, shard: int, cached: list[int], draft: _Draft) -> None:
        request = sequence.request
        if self.prefix_cache is not None and sequence.table is None and sequence.status is Status.WAITING:
            self.prefix_cache.count(len(sequence.tokens), len(cached) * self.page_size)
        table = self.books.start(sequence, shard, cached)
        sequence.first_step = self._num_steps
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = sequence.num_computed
        draft.admitted.append(sequence)
        self._append(table, len(sequence.tokens) - table.length, draft)
        self._plan_row(sequence, shard, min(table.length - sequence.num_computed, draft.budget[shard]), draft)

    # ------------------------------------------------------------------ results

    def commit(self, plan: StepPlan, sampled: SequenceOf[SequenceOf[int]]) -> list[TokenEvent]:
        """Takes the result of the oldest submitted step: appends tokens, ends sequences, offers pages to the cache.

        Args:
            plan: what `schedule` returned.
            sampled: `sampled[shard][i]` is the id drawn for `plan.rows[shard][i]`; ids of rows that do not sample, and
                any after the last row, are ignored. Plain ints (`array.tolist()`).

        Returns:
            The new tokens, in the order of the rows. A sequence that ended meanwhile has none.
        """
        if not self._submitted or self._submitted[0] is not plan:
            raise RuntimeError("plans are committed once each, in the order in which they were made")
        self._submitted.popleft()
        now = self._clock()
        events = []
        for rows, ids in zip(plan.rows, sampled, strict=True):
            if len(ids) < len(rows):
                raise ValueError(f"{len(ids)} ids for {len(rows)} rows")
            for row, token in zip(rows, ids, strict=False):
                sequence = row.sequence
                if row.samples:
                    sequence.in_flight -= 1
                if sequence.status is Status.RUNNING:
                    full = (row.start + row.count) // self.page_size
                    if full > sequence.num_cached_pages:
                        self.books.offer_pages(sequence, full)
                elif sequence.status is Status.FINISHED:
                    continue
                if row.samples:
                    if sequence.request.first_token_time is None:
                        sequence.request.first_token_time = now
                    reason = sequence.append(token)
                    events.append(TokenEvent(sequence, token, reason))
                    if reason is not None:
                        self.finish(sequence, reason)
        return events
