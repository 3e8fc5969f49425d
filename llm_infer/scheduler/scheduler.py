"""Continuous batching: decides, step by step, which tokens of which sequences the device computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from llm_infer.base.errors import RequestError
from llm_infer.config import SchedulerConfig
from llm_infer.decoding.beam import BeamSearch
from llm_infer.decoding.speculative import Speculator
from llm_infer.kvcache.page_table import PageTable
from llm_infer.scheduler.beam_groups import is_ready, most_pages, pages_needed, prefill_end
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.decode_steps import choose_steps
from llm_infer.scheduler.invariants import check_books, check_in_flight
from llm_infer.scheduler.placement import Placement
from llm_infer.scheduler.plan import ScheduledRow, StepPlan
from llm_infer.scheduler.proposals import may_speculate, most_drafts, prepare_proposals
from llm_infer.scheduler.request import Request, Sequence, Status, TokenEvent


class _Draft:
    """The plan of a step while it is made: lists with one entry per shard, then lists over all shards."""

    def __init__(self, num_shards: int, budget: int) -> None:
        self.budget = [budget] * num_shards
        self.steps = 1
        self.single: list[list[ScheduledRow]] = [[] for _ in range(num_shards)]
        self.longer: list[list[ScheduledRow]] = [[] for _ in range(num_shards)]
        self.copies: list[list[tuple[int, int]]] = [[] for _ in range(num_shards)]
        self.num_drafts = [0] * num_shards
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
        speculator: proposes tokens for requests that allow it.
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
        speculator: Speculator | None = None,
    ) -> None:
        self.config = config
        self.speculator = speculator
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

    @property
    def needs_results(self) -> bool:
        """Something that runs cannot go on before the results of the last step are here: beams and proposals need ids."""
        return any(self._needs_results(sequence) for running in self.books.running for sequence in running)

    def _needs_results(self, sequence: Sequence) -> bool:
        request = sequence.request
        if self.speculator is None or not request.speculate:
            return request.beams is not None
        return sequence.num_drafts > 0 or sequence.speculation is None or not sequence.speculation.rest

    def usage(self, shard: int = 0) -> float:
        """Share of the shard's pages that cannot be handed out now."""
        return 1 - self.allocator.num_available(shard) / self.allocator.num_usable

    def check(self) -> None:
        """Verifies every invariant of sequences, slots and pages (slow); raises InvariantError."""
        check_books(self.books, self.requests.values())
        check_in_flight(self._submitted, self.requests.values())

    # ------------------------------------------------------------------ requests

    def longest(self, request: Request) -> int:
        """Tokens to which a sequence of a request may grow.

        Raises:
            RequestError: its id is in use, or it can never fit the context or the pages.
        """
        length = len(request.prompt)
        # A token that nobody wants needs no place.
        limit = self.max_model_len + request.prompt_only
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use by an unfinished request")
        if length >= limit:
            left = "" if request.prompt_only else " and one must be left for the output"
            raise RequestError(
                f"the prompt has {length} tokens, the context holds {self.max_model_len}{left}: "
                "shorten the prompt or raise max_model_len"
            )
        if request.max_tokens is not None:
            limit = min(limit, length + request.max_tokens)
        # The last token is drawn but its K/V are never computed.
        needed = -(-(limit - 1) // self.page_size)
        each, lower = "", ""
        if request.beams is not None:
            width = request.beams.width
            if width > self.config.max_num_seqs:
                raise RequestError(
                    f"beam_width={width}: {self.config.max_num_seqs} sequences can run at the same time: "
                    "raise max_num_seqs or lower beam_width"
                )
            needed = most_pages(length, limit - 1, width, self.page_size)
            each, lower = f" with {width} beams", "beam_width, "
        if needed > self.allocator.num_usable:
            raise RequestError(
                f"the request can grow to {limit} tokens{each}, which need {needed} pages of {self.page_size} tokens; there "
                f"are {self.allocator.num_usable}: raise num_pages or kv_cache_memory, or lower {lower}"
                "max_tokens or max_model_len"
            )
        return limit

    def add(self, request: Request) -> None:
        """Queues a request; raises as `longest`."""
        self.prepare(request)
        self._num_arrived += 1
        self.requests[request.request_id] = request
        self.books.enqueue(request.sequences[0])

    def prepare(self, request: Request) -> None:
        """Makes the sequences of a request, which `num_uncached` looks at; raises as `longest`. `add` does it once more."""
        limit = self.longest(request)
        request.arrival = self._num_arrived
        request.arrival_time = self._clock() if request.arrival_time is None else request.arrival_time
        first = request.priority if self.config.policy == "priority" else 0
        request.sequences = [Sequence(request, i, (first, request.arrival, i), limit) for i in range(request.n)]
        if request.beams is not None:
            request.search = BeamSearch(
                request.beams,
                stop_ids=request.sequences[0].stop_ids,
                min_tokens=request.min_tokens,
                max_tokens=limit - len(request.prompt),
            )

    def num_uncached(self, request: Request) -> int:
        """Tokens of the prompt of a request that nothing of has run yet which the prefix cache does not have."""
        return self._placement.num_uncached(request.sequences[0])

    def abort(self, request_id: str) -> bool:
        """Ends a request at once; tokens in flight are dropped when they come. False if there is none of that id."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for sequence in reversed(request.sequences):  # the first last: while it lives, the others wait for it
            self.finish(sequence, "abort")
        return True

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends one sequence, for example at a stop string; of a beam search all. No effect if it has ended."""
        if sequence.status is Status.FINISHED:
            return
        request = sequence.request
        for member in request.sequences if request.beams is not None else (sequence,):
            self.books.end(member)
            member.finish_reason = reason
            if self.speculator is not None and member.speculation is not None:
                self.speculator.release(member.speculation)
        if (
            request.beams is None and sequence.sample_index == 0 and not request.forked
        ):  # nobody is left whom the other samples could fork
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
        draft.steps = choose_steps(self.books, self.config.num_scheduler_steps, speculating=self.speculator is not None)
        if self.speculator is not None and draft.steps == 1:
            prepare_proposals(self.speculator, self.books, self.config.max_num_batched_tokens)
        for shard in range(self.num_shards):
            self._schedule_running(shard, draft)
        self._admit_waiting(draft)
        while any(self._break_stall(shard, draft) for shard in range(self.num_shards)):
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
            if sequence.request.beams is not None:
                self._schedule_beam(sequence, shard, draft, prefilling)
                continue
            length = len(sequence.tokens) + sequence.in_flight
            # Not running any more: preempted for one before it. Long enough: its last token is in flight.
            if sequence.status is not Status.RUNNING or length >= sequence.max_length or sequence.num_drafts:
                continue
            if draft.steps > 1:
                self._plan_steps(sequence, shard, min(draft.steps, sequence.max_length - length), draft)
            elif length - sequence.num_computed > 1:
                prefilling.append(sequence)
            elif self._make_room(sequence, shard, draft):
                self._plan_row(sequence, shard, 1, draft, self._drafts(sequence, shard, draft))
        for sequence in prefilling:
            if sequence.status is Status.RUNNING and draft.budget[shard]:
                left = prefill_end(sequence) - sequence.num_computed
                self._plan_row(sequence, shard, min(left, draft.budget[shard]), draft)

    def _plan_steps(self, sequence: Sequence, shard: int, steps: int, draft: _Draft) -> None:
        """Plans several decode steps in one; `choose_steps` has seen that pages are there for all of them."""
        table, start, feeds = sequence.table, sequence.num_computed, sequence.in_flight > 0
        assert table is not None
        self._append(table, start + steps - table.length, draft)
        draft.single[shard].append(ScheduledRow(sequence, start, 1, True, feeds, steps=steps))
        draft.budget[shard] -= 1
        sequence.num_computed += steps
        sequence.in_flight += steps
        if sequence.speculation is not None:
            sequence.speculation.rest -= steps

    def _schedule_beam(self, beam: Sequence, shard: int, draft: _Draft, prefilling: list[Sequence]) -> None:
        """Plans one token of every beam when the first of them is looked at, or puts a returning beam into a list."""
        if beam.status is not Status.RUNNING or beam.in_flight:
            return
        if len(beam.tokens) - beam.num_computed > 1:
            prefilling.append(beam)
        elif beam.sample_index == 0 and is_ready(beam.request) and self._make_room_for_beams(beam, shard, draft):
            for each in beam.request.members:
                self._plan_row(each, shard, 1, draft)

    def _drafts(self, sequence: Sequence, shard: int, draft: _Draft) -> tuple[int, ...]:
        """Proposed tokens behind the next one of a sequence, and their places; only as far as pages are there anyway."""
        speculator, table = self.speculator, sequence.table
        if speculator is None or not may_speculate(sequence):
            return ()
        speculation = sequence.speculation = sequence.speculation or speculator.new(sequence)
        if speculation.rest:
            speculation.rest -= 1
            return ()
        num_running, used = len(self.books.running[shard]), draft.num_drafts[shard]
        limit = most_drafts(sequence, num_running, used, self.config.max_num_batched_tokens)
        drafts = []
        if limit > 0 and not sequence.in_flight:
            drafts = speculator.propose(speculation, sequence.tokens, num_running, limit)
        assert table is not None
        if not drafts or table.pages_needed(len(drafts)) > self.allocator.num_available(shard):
            return ()
        self._append(table, len(drafts), draft)
        draft.num_drafts[shard] += len(drafts)
        sequence.num_drafts = len(drafts)
        return tuple(drafts)

    def _plan_row(
        self, sequence: Sequence, shard: int, count: int, draft: _Draft, drafts: tuple[int, ...] = ()
    ) -> None:
        start = sequence.num_computed
        samples = start + count == len(sequence.tokens) + sequence.in_flight
        count += len(drafts)
        rows = draft.single[shard] if count == 1 else draft.longer[shard]
        rows.append(ScheduledRow(sequence, start, count, samples, sequence.in_flight > 0, drafts))
        draft.budget[shard] -= count
        sequence.num_computed = start + count
        if samples:
            sequence.in_flight += 1
            if not sequence.request.forked and sequence.request.beams is None:
                self._fork(sequence, draft)

    def _fork(self, parent: Sequence, draft: _Draft) -> None:
        parent.request.forked = True
        for child in parent.request.sequences[1:]:
            if child.status is Status.WAITING:
                self.books.fork(parent, child)
                draft.forked.append(child)

    def _make_room(self, sequence: Sequence, shard: int, draft: _Draft) -> bool:
        """A place for the next token of a running sequence; False if the sequence itself had to give up its pages."""
        table = sequence.table
        assert table is not None
        # The first: its last prompt token, which has its place since admission.
        if table.length > sequence.num_computed or table.append_in_place():
            return True
        while table.pages_needed(1) > self.allocator.num_available(shard):
            if self._take_pages(shard, draft) is sequence:
                return False
        self._append(table, 1, draft)
        return True

    def _make_room_for_beams(self, first: Sequence, shard: int, draft: _Draft) -> bool:
        """Places for the next tokens of all beams of a request; False if they had to give up their pages."""
        beams = first.request.members
        # A beam that has returned after a preemption has had its place since then.
        tables = [b.table for b in beams if b.table is not None and b.table.length == b.num_computed]
        while pages_needed(tables) > self.allocator.num_available(shard):
            if self._take_pages(shard, draft).request is first.request:
                return False
        for table in tables:
            self._append(table, 1, draft)
        return True

    def _take_pages(self, shard: int, draft: _Draft) -> Sequence:
        """The sequence of the lowest rank with pages on a shard gives them up, and with a beam all others of its group."""
        books = self.books
        victim = max(books.running[shard][-1:] + books.parked[shard][-1:], key=lambda member: member.rank)
        if victim.status is not Status.RUNNING:
            books.unpark(victim)
            return victim
        group = (victim,) if victim.request.beams is None else victim.request.members
        for member in group:
            if member.status is Status.RUNNING:
                books.preempt(member)
                draft.preempted.append(member)
        victim.request.num_preemptions += 1
        self.num_preemptions += 1
        draft.short_of_pages[shard] = True
        return victim

    def _break_stall(self, shard: int, draft: _Draft) -> bool:
        """If nothing can run, because beams of several requests wait for the rest of their groups: the last gives way."""
        books = self.books
        running = books.running[shard]
        outstanding = any(plan.rows[shard] for plan in self._submitted)
        if not running or draft.single[shard] or draft.longer[shard] or outstanding:
            return False
        first = running[0].request
        alone = not books.parked[shard] and all(beam.request is first for beam in running)
        if alone and books.waiting[0].request is first:
            raise RuntimeError(
                f"the beams of request {first.request_id!r} do not fit the pages although they are alone"
            )
        self._take_pages(shard, draft)
        draft.short_of_pages[shard] = False
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
            shut.update(shard for shard in all_shards if not draft.budget[shard])
            if len(shut) == self.num_shards:
                return
            sequence = books.waiting[index]
            bound = sequence.request.shard
            shards = set(all_shards if bound is None else (bound,)) - shut
            # What the outstanding step did for a sequence that has just been preempted is not committed yet.
            preempted = any(
                sequence is victim or (sequence.request is victim.request and victim.request.beams is not None)
                for victim in draft.preempted
            )
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
        self._plan_row(sequence, shard, min(prefill_end(sequence) - sequence.num_computed, draft.budget[shard]), draft)

    # ------------------------------------------------------------------ results

    def commit(
        self,
        plan: StepPlan,
        sampled: SequenceOf[SequenceOf[int]],
        candidates: SequenceOf[SequenceOf[SequenceOf[tuple[int, float]]]] = (),
    ) -> list[TokenEvent]:
        """Takes the result of the oldest submitted step: appends tokens, ends sequences, offers pages to the cache.

        Args:
            plan: what `schedule` returned.
            sampled: `sampled[shard][i]` is the id drawn for `plan.rows[shard][i]`; ids of rows that do not sample, and
                any further ones, are ignored. Behind the ids of all rows come those of their drafts: of each row with
                drafts the ids drawn before its last token, in their order. Plain ints (`array.tolist()`). Of a plan of
                several decode steps, `sampled[shard][step][i]`.
            candidates: where rows of beams sample, `candidates[shard][i]` are the most likely next tokens of the row and
                their log-probabilities, best first (see `BeamSearch.advance`).

        Returns:
            The new tokens, in the order of the rows. A sequence that ended meanwhile has none. Beams have theirs, all at
            once, when the search is over.
        """
        if not self._submitted or self._submitted[0] is not plan:
            raise RuntimeError("plans are committed once each, in the order in which they were made")
        self._submitted.popleft()
        now = self._clock()
        events: list[TokenEvent] = []
        searches: dict[Request, list[SequenceOf[tuple[int, float]]]] = {}
        if plan.num_steps > 1:
            return [
                event for rows, ids in zip(plan.rows, sampled, strict=True) for event in self._commit_steps(rows, ids)
            ]
        for shard, (rows, ids) in enumerate(zip(plan.rows, sampled, strict=True)):
            if len(ids) < len(rows):
                raise ValueError(f"{len(ids)} ids for {len(rows)} rows")
            next_draft = len(rows)
            for index, (row, token) in enumerate(zip(rows, ids, strict=False)):
                sequence = row.sequence
                if row.samples:
                    sequence.in_flight -= row.steps
                if row.drafts:
                    drawn = [*ids[next_draft : next_draft + len(row.drafts)], token]
                    next_draft += len(row.drafts)
                    events += self._commit_drafts(row, drawn)
                    continue
                if sequence.status is Status.RUNNING:
                    full = (row.start + row.count) // self.page_size
                    if full > sequence.num_cached_pages:
                        self.books.offer_pages(sequence, full)
                elif sequence.status is Status.FINISHED:
                    continue
                if row.samples:
                    if sequence.request.first_token_time is None:
                        sequence.request.first_token_time = now
                    if sequence.request.beams is not None:
                        searches.setdefault(sequence.request, []).append(candidates[shard][index])
                        continue
                    reason = sequence.append(token)
                    events.append(TokenEvent(sequence, token, reason))
                    if reason is not None:
                        self.finish(sequence, reason)
        for request, found in searches.items():
            events += self._advance_search(request, found)
        return events

    def _commit_steps(self, rows: SequenceOf[ScheduledRow], sampled: SequenceOf[SequenceOf[int]]) -> list[TokenEvent]:
        """Takes in the tokens of several decode steps, of each sequence as far as it goes; `sampled[step][row]`."""
        events: list[TokenEvent] = []
        for index, row in enumerate(rows):
            sequence, reason, count = row.sequence, None, 0
            sequence.in_flight -= row.steps
            if sequence.status is Status.FINISHED:
                continue
            while reason is None and count < row.steps:
                token = sampled[count][index]
                reason = sequence.append(token)
                events.append(TokenEvent(sequence, token, reason))
                count += 1
            if sequence.status is Status.RUNNING:
                full = (row.start + count) // self.page_size
                if full > sequence.num_cached_pages:
                    self.books.offer_pages(sequence, full)
            if reason is not None:
                self.finish(sequence, reason)
        return events

    def _commit_drafts(self, row: ScheduledRow, drawn: list[int]) -> list[TokenEvent]:
        """Accepts proposed tokens as far as the target drew them itself; the places of the others are given back."""
        sequence = row.sequence
        sequence.num_drafts = 0
        if sequence.status is Status.FINISHED:
            return []
        events, reason, accepted = [], None, 0
        for token, draft in zip(drawn, (*row.drafts, None), strict=True):
            reason = sequence.append(token)
            events.append(TokenEvent(sequence, token, reason))
            if reason is not None or token != draft:
                break
            accepted += 1
        assert self.speculator is not None and sequence.speculation is not None
        self.speculator.observe(sequence.speculation, len(row.drafts), accepted)
        if sequence.status is Status.RUNNING and sequence.table is not None:
            sequence.num_computed = row.start + row.count - len(row.drafts) + accepted
            sequence.table.truncate(sequence.num_computed)
            full = sequence.num_computed // self.page_size
            if full > sequence.num_cached_pages:
                self.books.offer_pages(sequence, full)
        if reason is not None:
            self.finish(sequence, reason)
        return events

    def _advance_search(
        self, request: Request, candidates: SequenceOf[SequenceOf[tuple[int, float]]]
    ) -> list[TokenEvent]:
        """Moves a beam search on by one step (rows of a group are in the order of its members)."""
        search = request.search
        assert search is not None
        children = search.advance([beam.output for beam in request.members], candidates)
        if children is not None:
            self.books.reorder(request, children, self._num_steps)
            return []
        events = []
        self.finish(request.sequences[0], "stop")
        for sequence, result in zip(request.sequences, search.results, strict=True):
            sequence.tokens = [*request.prompt, *result.tokens]
            sequence.finish_reason, sequence.score = result.finish_reason, result.score
            events += [TokenEvent(sequence, token, None) for token in result.tokens]
            events[-1].finish_reason = result.finish_reason
        return events
