"""Continuous batching: decides, step by step, which tokens of which sequences the device computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

from llm_infer.base.errors import RequestError
from llm_infer.config import SchedulerConfig
from llm_infer.decoding.speculative import Speculator
from llm_infer.kvcache.groups import Windows
from llm_infer.scheduler.admission import Admission
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.invariants import check_books, check_in_flight
from llm_infer.scheduler.limits import Limits, tokens_ahead
from llm_infer.scheduler.plan import StepPlan
from llm_infer.scheduler.plan_builder import PlanBuilder, ShardPlan
from llm_infer.scheduler.request import Request, Sequence, Status, TokenEvent
from llm_infer.scheduler.step_result import StepResult
from llm_infer.scheduler.strategies import Strategies
from llm_infer.scheduler.strategies.several_steps import choose_steps


class Scheduler:
    """Turns requests into steps.

    A step takes, per shard and under the token budget: one token of every running sequence that decodes, then chunks of
    running prefills, then waiting sequences in the order of their rank (first come first served, or by priority). A
    sequence is admitted when pages for all its tokens are there and enough stay free for the others to grow
    (Admission). It gets those pages at once, so only decoding can run short of them; then the sequence of the lowest
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
        windows: of each group of layers that has pages of its own, see `PageGroups`.
        num_states: of a recurrent model, pages for states of one shard, with the null page: two for each sequence that may run,
            and those of snapshots.
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
        windows: Windows = (None,),
        num_states: int = 0,
        clock: Callable[[], float] = time.monotonic,
        speculator: Speculator | None = None,
    ) -> None:
        self.config = config
        self.speculator = speculator
        self.page_size = page_size
        self.num_shards = num_shards
        self.books = Books(
            num_pages=num_pages,
            page_size=page_size,
            num_shards=num_shards,
            num_slots=config.max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
            windows=windows,
            ahead=tokens_ahead(config),
            num_states=num_states,
        )
        self.allocator = self.books.allocator
        self.prefix_cache = self.books.prefix_cache
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.num_copied_pages = 0
        self._strategies = Strategies(speculator, config.max_num_batched_tokens)
        self._admission = Admission(self.books, int(config.watermark * self.allocator.num_usable))
        self._limits = Limits(
            *(max_model_len, config.max_num_seqs, self.allocator.num_usable, page_size, windows, self.books.ahead),
            states=num_states > 0,
        )
        self._submitted: deque[StepPlan] = deque()
        self._num_arrived = self._num_weights = 0
        self._num_planned = 0
        self._clock = clock

    @property
    def has_unfinished(self) -> bool:
        """Whether there are requests that have not ended."""
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
        """Whether something that runs cannot go on before the results of the last step are here."""
        return any(
            sequence.request.strategy.needs_result(sequence) for running in self.books.running for sequence in running
        )

    def usage(self, shard: int = 0) -> float:
        """Returns the share of a shard's pages that cannot be handed out now."""
        return 1 - self.allocator.num_available(shard) / self.allocator.num_usable

    def check(self) -> None:
        """Verifies every invariant of sequences, slots and pages (slow); raises InvariantError."""
        check_books(self.books, self.requests.values())
        check_in_flight(self._submitted, self.requests.values())

    # ------------------------------------------------------------------ requests

    def longest(self, request: Request) -> int:
        """Returns the number of tokens to which a sequence of a request may grow.

        Raises:
            RequestError: its id is in use, or it can never fit the context, the pages or the slots.
        """
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use by an unfinished request")
        return self._limits.longest(request)

    def add(self, request: Request) -> None:
        """Queues a request; raises as `longest`."""
        self.prepare(request)
        self._num_arrived += 1
        self.requests[request.request_id] = request
        self.books.enqueue(request.sequences[0])

    def prepare(self, request: Request) -> None:
        """Makes the sequences of a request, which `num_uncached` looks at; raises as `longest`. `add` does it once more."""
        limit = self.longest(request)
        request.arrival, request.weights = self._num_arrived, self._num_weights
        request.arrival_time = self._clock() if request.arrival_time is None else request.arrival_time
        first = request.priority if self.config.policy == "priority" else 0
        request.sequences = [Sequence(request, i, (first, request.arrival, i), limit) for i in range(request.n)]
        request.strategy = self._strategies.of(request)

    def num_uncached(self, request: Request) -> int:
        """Counts the prompt tokens that the prefix cache does not have, of a request of which nothing has run."""
        return self._admission.num_uncached(request.sequences[0])

    def abort(self, request_id: str) -> bool:
        """Ends a request at once; tokens in flight are dropped when they come. Returns False if there is none of that id."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for sequence in reversed(request.sequences):  # the first last: while it lives, the others wait for it
            self.finish(sequence, "abort")
        return True

    def forget_prefixes(self) -> None:
        """Forgets the prefix cache, because pages no longer hold what would be computed now; to be called between steps.

        Requests that have pages go on with them, but nobody else finds what they compute.
        """
        self._num_weights += 1
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        if self.books.states is not None:
            self.books.states.clear()
        for request in self.requests.values():
            if any(sequence.table is not None for sequence in request.sequences):
                continue
            request.weights = self._num_weights
            for sequence in request.sequences:
                sequence.digests.clear()

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence, for example at a stop string, and with it its group. Has no effect if it has ended."""
        if sequence.status is Status.FINISHED:
            return
        request = sequence.request
        for member in (sequence,) if request.width == 1 else request.sequences:
            self.books.end(member)
            member.finish_reason = reason
            request.strategy.ended(member)
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
        """Plans the next step, to be submitted to the device at once; None if nothing can be done before a commit or an add.

        Rows that sample count as drawn from now on, all rows as computed. It is None only while a step is outstanding
        or no request is unfinished.
        """
        if len(self._submitted) > 1:
            raise RuntimeError("two submitted steps are not committed: commit the first before the next is planned")
        steps = choose_steps(self.books, self.config.num_scheduler_steps)
        builder = PlanBuilder(self.books, self.config.max_num_batched_tokens, steps)
        self._strategies.prepare(builder)
        for shard in builder.shards:
            self._schedule_running(shard)
        self._admit_waiting(builder)
        while any(self._break_stall(shard) for shard in builder.shards):
            self._admit_waiting(builder)
        for sequence in builder.forked:  # only now: the step that computes the prompt comes before the forks' first
            self.books.enqueue(sequence)
        self.allocator.unpin_all()
        if self.books.states is not None:
            self.books.states.allocator.unpin_all()
        self.num_preemptions += builder.num_preemptions
        plan = builder.build(self._num_planned)
        if plan is None and builder.preempted and not self._submitted:  # those may be admitted now
            return self.schedule()
        if plan is not None:
            self.num_copied_pages += sum(map(len, plan.copies))
            self._num_planned += 1
            self._submitted.append(plan)
        return plan

    def _schedule_running(self, plan: ShardPlan) -> None:
        """Decodes in the order of rank, so that a victim (always of a lower rank) is not planned yet; then prefills."""
        prefilling = []
        for sequence in tuple(plan.running):
            length = len(sequence.tokens) + sequence.in_flight
            # Not running any more: preempted for one before it. Long enough: its last token is in flight.
            if sequence.status is not Status.RUNNING or length >= sequence.max_length:
                continue
            if length - sequence.num_computed > 1:
                prefilling.append(sequence)
            else:
                sequence.request.strategy.rows(sequence, plan)
        for sequence in prefilling:
            if sequence.status is Status.RUNNING and plan.budget:
                self._prefill(sequence, plan)

    def _prefill(self, sequence: Sequence, plan: ShardPlan) -> None:
        """Computes as much as the budget allows of what a sequence computes without others."""
        end = sequence.length - sequence.request.strategy.num_joint(sequence)
        count = min(end - sequence.num_computed, plan.budget)
        if plan.states is not None:
            count = self._until_wanted_state(sequence, count, end)
        if count := plan.chunk(sequence, count):
            plan.add_row(sequence, count)

    def _until_wanted_state(self, sequence: Sequence, count: int, end: int) -> int:
        """Returns how many of `count` tokens, of those before `end`, lead to a state that others can go on from.

        That is the one before the last token of a prompt, from which samples fork, and those behind full pages.
        """
        request, start, size = sequence.request, sequence.num_computed, self.page_size
        prompt = len(request.prompt)
        if request.width == 1 < request.n and not request.forked and start < prompt - 1:
            end = min(end, prompt - 1)
            count = min(count, end - start)
        if self.prefix_cache is None or (start >= prompt and count <= size):  # such as tokens that were proposed
            return count
        border = (end - 1 if start + count == end else start + count) // size * size
        return border - start if border > start else count

    def _break_stall(self, plan: ShardPlan) -> bool:
        """Makes the last group give way where nothing can run, because groups wait for the rest of their own."""
        books, running = self.books, plan.running
        outstanding = any(submitted.rows[plan.shard] for submitted in self._submitted)
        if not running or plan.single or plan.longer or outstanding:
            return False
        first = running[0].request
        alone = not books.parked[plan.shard] and all(member.request is first for member in running)
        if alone and books.waiting and books.waiting[0].request is first:
            if first.uncached:
                raise RuntimeError(
                    f"the beams of request {first.request_id!r} do not fit the pages although they are alone"
                )
            first.uncached = True
        plan.take_pages()
        plan.short_of_pages = False
        return True

    def _admit_waiting(self, builder: PlanBuilder) -> None:
        """Admits in the order of rank. Nobody overtakes on a shard where a sequence of a higher rank did not fit."""
        books, plans = self.books, builder.shards
        # Right after a preemption, pages that become free are for those who run.
        shut = {plan.shard for plan in plans if plan.short_of_pages and plan.running}
        index = 0
        while index < len(books.waiting):
            shut.update(plan.shard for plan in plans if not plan.budget)
            if len(shut) == self.num_shards:
                return
            sequence = books.waiting[index]
            bound = sequence.request.shard
            shards = set(range(self.num_shards) if bound is None else (bound,)) - shut
            # What the outstanding step did for a sequence that has just been preempted is not committed yet.
            preempted = any(victim in sequence.group for victim in builder.preempted)
            place = None if preempted else self._admission.find(sequence, shards)
            if place is not None:
                shard, cached = place
                self._admit(sequence, cached, plans[shard])
            elif preempted or not self._unpark_idle(shards):
                shut |= shards
                index += 1

    def _unpark_idle(self, shards: set[int]) -> bool:
        """Makes the last of the waiting forks give back its pages where nothing runs: nothing else would."""
        for shard in shards:
            if self.books.parked[shard] and not self.books.running[shard]:
                self.books.unpark(self.books.parked[shard][-1])
                return True
        return False

    def _admit(self, sequence: Sequence, cached: list[list[int]], plan: ShardPlan) -> None:
        request = sequence.request
        if self.prefix_cache is not None and sequence.table is None and sequence.status is Status.WAITING:
            self.prefix_cache.count(len(sequence.tokens), len(cached[0]) * self.page_size)
        table = self.books.start(sequence, plan.shard, cached)
        sequence.first_step = self._num_planned
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = sequence.num_computed
        plan.step.admitted.append(sequence)
        plan.note_copies(table.reserve(len(sequence.tokens) - table.length))
        self._prefill(sequence, plan)

    # ------------------------------------------------------------------ results

    def commit(
        self,
        plan: StepPlan,
        sampled: SequenceOf[SequenceOf[Any]],
        candidates: SequenceOf[SequenceOf[SequenceOf[tuple[int, float]]]] = (),
    ) -> list[TokenEvent]:
        """Takes in the result of the oldest submitted step: has tokens appended, sequences ended, pages offered to the cache.

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
        now, several = self._clock(), plan.num_steps > 1
        result = StepResult(self.books, self.finish, self._num_planned)
        for rows, each in zip(plan.rows, candidates, strict=False):
            result.candidates |= {row.sequence: found for row, found in zip(rows, each, strict=False) if found}
        for rows, ids in zip(plan.rows, sampled, strict=True):
            if len(ids) < len(rows) and not several:
                raise ValueError(f"{len(ids)} ids for {len(rows)} rows")
            next_draft = len(rows)
            of_rows = zip(*ids, strict=True) if several else zip(ids, strict=True)
            for row, drawn in zip(rows, of_rows, strict=False):
                if not row.samples:
                    result.offer_pages(row.sequence, row.start + row.count)
                    continue
                if several:
                    drawn = drawn[: row.steps]
                elif row.drafts:
                    drawn = (*ids[next_draft : next_draft + len(row.drafts)], *drawn)
                    next_draft += len(row.drafts)
                sequence, request = row.sequence, row.sequence.request
                sequence.in_flight -= row.steps
                if sequence.status is not Status.FINISHED:
                    if request.first_token_time is None:
                        request.first_token_time = now
                    request.strategy.commit(row, drawn, result)
        for conclude in result.after_rows:
            conclude()
        return result.events
