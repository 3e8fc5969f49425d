"""A device that computes nothing but remembers what lies in every page, to check what each row would attend to."""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from llm_infer.config import SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.speculative import Speculator
from llm_infer.scheduler import Request, Scheduler, Sequence, Status, StepPlan, TokenEvent
from llm_infer.scheduler.plan import ScheduledRow
from tests.naive_beam import naive_beam_search

VOCABULARY = 7
EOS = 6


def next_token(tokens: list[int], sample_index: int) -> int:
    """The model: the next token is a hash of all tokens so far. Few ids, so that outputs share pages now and then."""
    return zlib.crc32(np.array([sample_index, *tokens], np.int32).tobytes()) % VOCABULARY


def continuation(request: Request, sample_index: int, limit: int) -> list[int]:
    """The output that a sample must have, computed without pages."""
    tokens = list(request.prompt)
    sampling = request.sampling
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)}
    while len(tokens) < limit:
        tokens.append(next_token(tokens, sample_index))
        if tokens[-1] in stops and len(tokens) - len(request.prompt) >= sampling.min_tokens:
            break
    return tokens[len(request.prompt) :]


def log_probabilities(tokens: list[int]) -> np.ndarray:
    """What beams see: [VOCABULARY] log-probabilities that follow from all tokens so far."""
    noise = [zlib.crc32(np.array([token, *tokens], np.int32).tobytes()) % 997 for token in range(VOCABULARY)]
    values = np.array(noise) / 250
    return values - np.log(np.exp(values).sum())


class FakeDevice:
    """Runs plans in the order of submission on a content model of the pages, and checks every access.

    A slot of a page holds (token, position, how often the weights had changed) as they were written to it. What a row
    attends to is gathered through its page table and must be the tokens of its own sequence, computed with weights no
    older than its request; the next token is computed from what was gathered.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        allocator = scheduler.allocator
        self.scheduler = scheduler
        self.pages = np.full((scheduler.num_shards, allocator.num_pages, scheduler.page_size, 3), -1, np.int64)
        states = scheduler.books.states
        num_states = 0 if states is None else states.allocator.num_pages
        # Of each page of a state the tokens that it has taken in, and how often the weights had changed for the oldest.
        self.states: list[list[tuple[list[int], int]]] = [[([-1], -1)] * num_states for _ in self.pages]
        self.candidates: list[list[list[tuple[int, float]]]] = []
        self.written: dict[Sequence, dict[int, int]] = {}  # tokens by position
        self.ended: set[Sequence] = set()  # before the host knows: what steps do for them is for nothing
        self.last_ids = np.full((scheduler.num_shards, scheduler.config.max_num_seqs), -1, np.int64)

    def run(self, plan: StepPlan) -> list[Any]:
        """The ids that the rows draw. To be called when the plan is submitted: it reads the page tables."""
        self.candidates = [[] for _ in range(self.scheduler.num_shards)]
        return [self._run_shard(shard, plan) for shard in range(self.scheduler.num_shards)]

    def _run_shard(self, shard: int, plan: StepPlan) -> list[Any]:
        pages, rows = self.pages[shard], plan.rows[shard]
        counts = [row.count for row in rows]
        assert sum(counts) <= self.scheduler.config.max_num_batched_tokens
        assert len(rows) <= self.scheduler.config.max_num_seqs and len({id(row.sequence) for row in rows}) == len(rows)
        assert sorted(counts, key=lambda count: count > 1) == counts, "rows of one token come first"

        copies = plan.copies[shard]
        sources, destinations = {pair[0] for pair in copies}, [pair[1] for pair in copies]
        assert len(set(destinations)) == len(destinations) and not sources & set(destinations)
        assert len(destinations) <= len(rows) * len(self.scheduler.books.windows)
        assert 0 not in sources | set(destinations)
        for source, destination in copies:
            pages[destination] = pages[source]

        written: set[tuple[int, int]] = set()
        for row in rows:
            table = row.sequence.table
            assert table is not None and row.sequence.slot is not None and table.shard == shard
            assert row.start + row.count <= table.length and row.count > 0
            if row.feeds:
                assert row.count == 1
                fed = [int(self.last_ids[shard, row.sequence.slot])]
            else:
                end = row.start + row.count - len(row.drafts)
                fed = [*row.sequence.tokens[row.start : end], *row.drafts]
            assert len(fed) == row.count
            for position, token in enumerate(fed, row.start):
                if row.sequence not in self.ended:
                    self._write(shard, row.sequence, position, token, written)
        if self.scheduler.books.states is not None:
            self._run_states(shard, rows)
        if plan.num_steps > 1:
            return self._run_steps(shard, plan, written)
        self._check_readers(shard, rows, written)
        ids = [self._attend(shard, row.sequence, row.start + row.count) for row in rows]
        for row in rows:
            ends = range(row.start + row.count - len(row.drafts), row.start + row.count)
            ids += [self._attend(shard, row.sequence, end) for end in ends]
            if row.drafts:  # nobody may use it
                self.last_ids[shard, row.sequence.slot] = -1
        return ids

    def _run_states(self, shard: int, rows: tuple[ScheduledRow, ...]) -> None:
        """Each row goes on from the state behind the tokens before it; nobody reads what another row writes."""
        reads = {row.state_from for row in rows if row.start}
        writes = [row.state_to for row in rows]
        assert 0 not in writes and len(set(writes)) == len(writes)
        for row in rows:
            others = (
                reads if row.state_from != row.state_to else {x.state_from for x in rows if x is not row and x.start}
            )
            assert row.state_to not in others, "a row writes the state that another one reads"
        before = list(self.states[shard])
        for row in rows:
            sequence = row.sequence
            if sequence in self.ended:
                continue
            taken, weights = before[row.state_from] if row.start else ([], self.scheduler._num_weights)
            tokens = [self.written[sequence][at] for at in range(row.start, row.start + row.certain)]
            known = sequence.tokens[: row.start]
            assert len(taken) == row.start and taken[: len(known)] == known, f"{sequence}: state of {taken}"
            assert weights >= sequence.request.weights, f"{sequence} goes on from a state of older weights"
            self.states[shard][row.state_to] = [*taken, *tokens], weights

    def _write(self, shard: int, sequence: Sequence, position: int, token: int, written: set[tuple[int, int]]) -> None:
        assert sequence.table is not None and position < sequence.table.length
        self.written.setdefault(sequence, {})[position] = token
        index, offset = divmod(position, self.scheduler.page_size)
        for pages in sequence.table.groups:
            page = pages[index]
            assert page != 0 and (page, offset) not in written
            self._check_owners(shard, page, position, sequence)
            written.add((page, offset))
            self.pages[shard, page, offset] = token, position, self.scheduler._num_weights

    def _run_steps(self, shard: int, plan: StepPlan, written: set[tuple[int, int]]) -> list[list[int]]:
        """Several decode steps: `ids[step][row]`, -1 where the row has ended. A program may have room for more steps."""
        rows = plan.rows[shard]
        ids = [[-1] * len(rows) for _ in range(plan.num_steps + 2)]
        for index, row in enumerate(rows):
            sequence, request, new = (
                row.sequence,
                row.sequence.request,
                row.start + 1 - len(row.sequence.request.prompt),
            )
            assert row.count == 1 and row.samples and not row.drafts and new >= max(1, request.sampling.min_tokens)
            for step in range(0 if sequence in self.ended else row.steps):
                if step:
                    self._write(shard, sequence, row.start + step, ids[step - 1][index], written)
                    if row.state_to:
                        self.states[shard][row.state_to][0].append(ids[step - 1][index])
                ids[step][index] = self._attend(shard, sequence, row.start + step + 1)
                if ids[step][index] in sequence.stop_ids:
                    self.ended.add(sequence)
                    break
        return ids

    def _check_owners(self, shard: int, page: int, position: int, writer: Sequence) -> None:
        """Nobody else owns a page that is written, but forks that wait for this very step to compute their prompt."""
        count = self.scheduler.allocator.refcount(shard, page)
        if count > 1:
            owners = [s for s in self.scheduler.books.waiting if s.table is not None and page in s.table.held()]
            forks = [s for s in owners if s.request is writer.request and s.num_computed == len(s.request.prompt) - 1]
            assert count == 1 + len(forks), f"{writer} writes page {page}, which has {count} owners"
            assert writer.sample_index == 0 and position < len(writer.request.prompt)

    def _check_readers(self, shard: int, rows: Iterable[ScheduledRow], written: set[tuple[int, int]]) -> None:
        """No sequence reads a slot that another writes in this step: kernels read and write in an order of their own."""
        size = self.scheduler.page_size
        read = Counter[tuple[int, int]]()
        for row in rows:
            if row.sequence not in self.ended:
                assert row.sequence.table is not None
                for pages, window in zip(row.sequence.table.groups, self.scheduler.books.windows, strict=True):
                    first = 0 if window is None else max(0, row.start - window + 1)
                    read.update((pages[at // size], at % size) for at in range(first, row.start + row.count))
        assert all(read[slot] <= 1 for slot in written)

    def _attend(self, shard: int, sequence: Sequence, length: int) -> int:
        """Everything that the last token of a row sees must be the sequence's own history."""
        assert sequence.table is not None and sequence.slot is not None
        if sequence in self.ended:
            self.candidates[shard].append([])
            return -1
        known = sequence.tokens[:length]
        # Those that the host does not know are in the pages, or were there before the windows left them behind.
        tokens = known + [self.written[sequence][at] for at in range(len(known), length)]
        for pages, window in zip(sequence.table.groups, self.scheduler.books.windows, strict=True):
            first = 0 if window is None else max(0, length - window)
            seen = self.pages[shard, pages].reshape(-1, 3)[first:length]
            assert (seen[:, 2] >= sequence.request.weights).all(), f"{sequence} reads what older weights computed"
            assert seen[:, 1].tolist() == list(range(first, length)), f"{sequence}: positions {seen[:, 1]}"
            tokens[first:] = seen[:, 0].tolist()
            assert tokens[: len(known)] == known, f"{sequence}: attends to {tokens}, its tokens are {known}"
        values = log_probabilities(tokens) if sequence.request.sampling.beam_width else np.zeros(0)
        self.candidates[shard].append([(int(i), float(values[i])) for i in np.argsort(-values, kind="stable")])
        drawn = next_token(tokens, sequence.sample_index)
        self.last_ids[shard, sequence.slot] = drawn
        return drawn


class FakeEngine:
    """Schedule, submit, commit, as the engine does it; `overlap` plans a step before the one before is committed."""

    def __init__(self, *, overlap: bool = True, check: bool = True, **options: Any) -> None:
        limits = {name: options.pop(name) for name in SchedulerConfig.__dataclass_fields__ if name in options}
        limits.setdefault("max_num_seqs", 4)
        limits.setdefault("max_num_batched_tokens", 16)
        self.max_model_len = limits["max_model_len"] = limits.get("max_model_len", 64)
        config = SchedulerConfig(**limits)
        if drafts := options.pop("num_drafts", 0):
            options["speculator"] = Speculator(SpeculativeConfig(num_speculative_tokens=drafts, prompt_lookup_min=1))
        defaults = {"num_pages": 40, "page_size": 4, "max_model_len": self.max_model_len}
        self.scheduler = Scheduler(config, **(defaults | options))
        self.device = FakeDevice(self.scheduler)
        self.overlap = overlap
        self.check = check
        self.pending: deque[tuple[StepPlan, list[Any], Any]] = deque()
        self.plans: list[StepPlan] = []
        self.requests: list[Request] = []
        self.num_steps = 0
        self.failed = False

    def add(self, prompt: list[int], **options: Any) -> Request:
        """Queues a request; the default is to end by length only. `options` are sampling parameters and a request's own."""
        sampling = {each.name: options.pop(each.name) for each in fields(SamplingParams) if each.name in options}
        request = Request(f"r{len(self.requests)}", prompt, SamplingParams(**sampling), **options)
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self) -> list[TokenEvent]:
        """One turn of the engine's loop."""
        self.failed = True
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.pending or not self.scheduler.has_unfinished, "the scheduler is stuck"
        else:
            self.pending.append((plan, self.device.run(plan), self.device.candidates))
            self.plans.append(plan)
        events: list[TokenEvent] = []
        if self.pending and (plan is None or not self.overlap or len(self.pending) > 1):
            events = self.scheduler.commit(*self.pending.popleft())
        # Beams do without, in every second step; proposals need to know the last token.
        if self.pending and self.scheduler.speculator is not None and self.scheduler.needs_results:
            events += self.scheduler.commit(*self.pending.popleft())
        self.num_steps += 1
        if self.check:
            self.scheduler.check()
        self.failed = False
        return events

    def run(self, max_steps: int = 100_000) -> list[TokenEvent]:
        """Steps until nothing is left."""
        events = []
        while self.scheduler.has_unfinished or self.pending:
            events += self.step()
            max_steps -= 1
            assert max_steps > 0, "requests do not end"
        return events

    def verify(self, request: Request) -> None:
        """Every sample's output is what the model gives without pages (an aborted one's is its beginning)."""
        limit = self.max_model_len
        if request.sampling.max_tokens is not None:
            limit = min(limit, len(request.prompt) + request.sampling.max_tokens)
        if request.sampling.beam_width is not None:
            self._verify_beams(request, limit)
            return
        for sequence in request.sequences:
            expected = continuation(request, sequence.sample_index, limit)
            if sequence.status is Status.FINISHED and sequence.finish_reason != "abort":
                assert sequence.output == expected, f"{sequence}: {sequence.output}, expected {expected}"
                stopped = expected[-1] in sequence.stop_ids and len(expected) >= request.sampling.min_tokens
                assert sequence.finish_reason == ("stop" if stopped else "length")
            else:
                assert sequence.output == expected[: len(sequence.output)]

    def _verify_beams(self, request: Request, limit: int) -> None:
        if not request.finished or request.sequences[0].finish_reason == "abort":
            return
        sampling = request.sampling
        assert sampling.beam_width is not None
        expected = naive_beam_search(
            log_probabilities,
            list(request.prompt),
            width=sampling.beam_width,
            max_tokens=limit - len(request.prompt),
            stop_ids=request.sequences[0].stop_ids,
            min_tokens=sampling.min_tokens,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
        )
        found = [(sequence.score, sequence.output) for sequence in request.sequences]
        assert [output for _, output in found] == [output for _, output in expected]
        np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-9)
