"""Random requests, steps and aborts against the whole host layer; every page access is checked by a content model."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from llm_infer.base.errors import RequestError
from llm_infer.scheduler import Request, Status
from tests.host.fake_device import EOS, FakeEngine

NUM_CONFIGURATIONS = 20
MIN_STEPS_EACH = 500  # 20 × 500 = the 10,000 steps that must be seen


def random_request(draw: random.Random) -> tuple[list[int], dict[str, Any]]:
    """A prompt that often begins like others do, and how to continue it."""
    prompt = [0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 2, 0][: draw.randint(0, 12)]
    prompt += [draw.randint(0, 2) for _ in range(draw.randint(0 if prompt else 1, 6))]
    max_tokens = draw.choice([None, draw.randint(1, 12)])
    beams: dict[str, Any] = {}
    if draw.random() < 0.25:
        beams = {"beam_width": draw.randint(1, 4), "length_penalty": draw.choice([0.0, 1.0, -0.5])}
        beams["early_stopping"] = draw.choice([True, False, "never"])
    n = draw.choice([1, 1, 2, 3, 4])
    return prompt, {
        **(beams or {"n": n}),
        "max_tokens": max_tokens,
        "min_tokens": 1 if max_tokens is None else max_tokens // 2,
        "eos_token_ids": frozenset({EOS}),
        "ignore_eos": draw.random() < 0.5,
        "priority": draw.randint(0, 2),
        "cache_salt": draw.choice([None, None, "a"]),
    }


class HostMachine(RuleBasedStateMachine):
    """Rules change something and take some steps, after each of which FakeEngine checks every invariant."""

    configuration: dict[str, Any]
    totals: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Request] = []
        self.given_back = 0
        self.engine = FakeEngine(**self.configuration)

    @initialize(count=st.integers(0, 40), number=st.integers(0, 2**16))
    def crowd(self, count: int, number: int) -> None:
        draw = random.Random(number)
        self.add([draw.getrandbits(16) for _ in range(count)], 0)

    @rule(numbers=st.lists(st.integers(0, 2**16), min_size=1, max_size=5), steps=st.integers(0, 3))
    def add(self, numbers: list[int], steps: int) -> None:
        for number in numbers:
            prompt, options = random_request(random.Random(number))
            try:
                self.live.append(self.engine.add(prompt, **options))
            except RequestError as error:
                assert "pages of" in str(error) or "beam_width" in str(error)
        self.take(steps)

    @rule(steps=st.integers(1, 40))
    def step(self, steps: int) -> None:
        self.take(steps)

    @rule(which=st.integers(0, 30), steps=st.integers(0, 2))
    def abort(self, which: int, steps: int) -> None:
        if self.live:
            request = self.live[which % len(self.live)]
            finished = request.finished
            assert self.engine.scheduler.abort(request.request_id) is not finished
            assert request.finished
            self.engine.scheduler.check()
        self.take(steps)

    @rule(which=st.integers(0, 30), sample=st.integers(0, 3), steps=st.integers(0, 2))
    def stop_one(self, which: int, sample: int, steps: int) -> None:
        """A stop string ends one sample."""
        if self.live:
            sequences = self.live[which % len(self.live)].sequences
            sequence = sequences[sample % len(sequences)]
            self.engine.scheduler.finish(sequence, "abort")
            assert sequence.status is Status.FINISHED
            self.engine.scheduler.check()
        self.take(steps)

    @rule(steps=st.integers(0, 2))
    def change_weights(self, steps: int) -> None:
        """Nobody who comes later finds pages of the old weights; what runs goes on."""
        self.engine.scheduler.forget_prefixes()
        cache = self.engine.scheduler.prefix_cache
        assert cache is None or not any(cache.pages(shard) for shard in range(self.engine.scheduler.num_shards))
        self.engine.scheduler.check()
        self.totals["weights changed"] += 1
        self.take(steps)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.check_windows()
        for request in self.live:
            self.engine.verify(request)
        self.live = [request for request in self.live if not request.finished]

    def check_windows(self) -> None:
        """A group with a window holds no more pages than the window and the tokens on their way take."""
        scheduler = self.engine.scheduler
        on_the_way = Counter[Any]()
        for plan, *_ in self.engine.pending:
            for row in (row for rows in plan.rows for row in rows):
                on_the_way[row.sequence] += row.count + row.steps - 1
        for sequence in (
            s for where in (scheduler.books.running, scheduler.books.parked) for each in where for s in each
        ):
            table = sequence.table
            assert table is not None
            if sequence.request.width > 1 and sequence.request.num_preemptions:
                continue  # beams keep pages for those that return later
            for pages, window in zip(table.groups, table.windows, strict=True):
                if window is not None:
                    held = sum(page != 0 for page in pages)
                    assert held <= -(-(window + on_the_way[sequence]) // table.page_size) + 1, sequence
                    self.given_back += len(pages) - held

    def teardown(self) -> None:
        if self.engine.failed:
            return
        self.engine.run()
        self.take(0)
        scheduler = self.engine.scheduler
        assert not self.live and not scheduler.num_waiting and not scheduler.num_running
        states = scheduler.books.states
        for shard in range(scheduler.num_shards):
            assert scheduler.allocator.num_available(shard) == scheduler.allocator.num_usable, "pages leaked"
            assert states is None or states.allocator.num_available(shard) == states.allocator.num_usable, (
                "states leaked"
            )
        cache = scheduler.prefix_cache
        self.totals["steps"] += len(self.engine.plans)
        self.totals["pages given back"] += self.given_back
        self.totals["requests"] += len(self.engine.requests)
        self.totals["preemptions"] += scheduler.num_preemptions
        self.totals["beam searches"] += sum(request.sampling.beam_width is not None for request in self.engine.requests)
        if scheduler.speculator is not None:
            self.totals["drafted"] += scheduler.speculator.num_drafted
            self.totals["accepted"] += scheduler.speculator.num_accepted
        self.totals["several steps in one"] += sum(plan.num_steps > 1 for plan in self.engine.plans)
        self.totals["copied pages"] += scheduler.num_copied_pages
        self.totals["cached tokens"] += cache.num_hits if cache else 0


def configuration(number: int) -> dict[str, Any]:
    """A small system: few pages, so that memory is short; few slots or few tokens a step."""
    draw = random.Random(number)
    max_num_seqs = draw.randint(1, 6)
    page_size = draw.choice([1, 2, 4])
    # None, no snapshots, and so many that none has to go.
    num_states = random.Random(number + 200).choice([0, 2 * max_num_seqs + 1, 2 * max_num_seqs + 4, 100])
    windows = random.Random(number + 100).choice([(None,), (None, 3), (4, None), (None, 2, 7), (None, 1, 5, 5), (12,)])
    return {
        "windows": windows,
        "num_states": num_states,
        "overlap": number % 2 == 0,
        "enable_prefix_caching": number % 3 > 0,
        "num_shards": 2 if number % 4 == 2 or number % 8 == 3 else 1,
        "policy": draw.choice(["fcfs", "priority"]),
        "page_size": page_size,
        # From just enough for the longest sequence to room for three.
        "num_pages": 1 + (draw.choice([1, 1, 1, 2]) * (24 // page_size) + draw.randint(-1, 1)) * len(windows),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + draw.choice([0, 3, 12]),
        "max_model_len": 25,
        "num_drafts": draw.choice([0, 1, 4]),
        "num_scheduler_steps": (1, 2, 5)[number % 3 if number < 12 else number % 2],
        "watermark": draw.choice([0.0, 0.1]),
    }


@pytest.mark.parametrize("number", range(NUM_CONFIGURATIONS))
def test_host_layer_keeps_its_invariants(number: int) -> None:
    class Machine(HostMachine):
        pass

    Machine.configuration = configuration(number)
    Machine.totals = Counter()
    rounds = 0
    while Machine.totals["steps"] < MIN_STEPS_EACH:
        run_state_machine_as_test(
            seed(1000 * number + rounds)(Machine),
            settings=settings(
                max_examples=5,
                stateful_step_count=25,
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
        rounds += 1
    print(Machine.configuration, dict(Machine.totals))
    assert Machine.totals["pages given back"] > 0 or Machine.configuration["windows"] == (None,)
    if Machine.configuration["enable_prefix_caching"]:
        assert Machine.totals["cached tokens"] > 0
