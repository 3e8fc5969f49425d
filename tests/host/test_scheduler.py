"""The scheduler's policy: order, chunks, preemption, parallel samples, placement, and that none of it changes tokens."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from llm_infer.base.errors import RequestError
from llm_infer.config import SchedulerConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.kvcache.page_allocator import InvariantError
from llm_infer.scheduler import Request, Scheduler, Status
from tests.host.fake_device import EOS, FakeEngine


def prompts(count: int, low: int = 3, high: int = 20, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(0, 5) for _ in range(draw.randint(low, high))] for _ in range(count)]


VARIANTS = {
    "plain": {},
    "no overlap": {"overlap": False},
    "chunks of 3": {"max_num_batched_tokens": 4},
    "chunks of 7 overlapped": {"max_num_batched_tokens": 7},
    "no prefix cache": {"enable_prefix_caching": False},
    "short of pages": {"num_pages": 15},
    "short of pages, no overlap, no cache": {"num_pages": 15, "overlap": False, "enable_prefix_caching": False},
    "one at a time": {"max_num_seqs": 1},
    "two shards": {"num_shards": 2, "num_pages": 15},
    "pages of one token": {"page_size": 1, "num_pages": 60},
    "speculation": {"num_drafts": 3},
    "speculation, no overlap, short of pages": {"num_drafts": 3, "overlap": False, "num_pages": 15},
    "pages of 16 tokens": {"page_size": 16, "num_pages": 10},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_do_not_depend_on_the_schedule(variant: str) -> None:
    engine = FakeEngine(**VARIANTS[variant])
    for index, prompt in enumerate(prompts(12)):
        engine.add(prompt, n=1 + index % 3, max_tokens=25, eos_token_ids=frozenset({EOS}), ignore_eos=index % 2 == 0)
    engine.run()
    for request in engine.requests:
        assert request.finished
        engine.verify(request)
    if "short" in variant:
        assert engine.scheduler.num_preemptions > 0
    usage = [engine.scheduler.usage(shard) for shard in range(engine.scheduler.num_shards)]
    assert usage == [0.0] * len(usage)


def test_first_come_first_served() -> None:
    engine = FakeEngine(max_num_seqs=2)
    requests = [engine.add([1] * 10, max_tokens=5 + index) for index in range(8)]
    order = [sequence.request for plan in _run(engine) for sequence in plan.admitted]
    assert order == requests
    assert requests == sorted(requests, key=lambda request: request.finish_time or 0)


def test_smaller_priority_value_goes_first() -> None:
    engine = FakeEngine(max_num_seqs=1, policy="priority")
    requests = [engine.add([1] * 10, max_tokens=5, priority=priority) for priority in (2, 0, 1, 0)]
    order = [sequence.request for plan in _run(engine) for sequence in plan.admitted]
    assert order == [requests[index] for index in (1, 3, 2, 0)]


def test_decode_goes_before_prefill_and_prefill_is_chunked() -> None:
    engine = FakeEngine(max_num_seqs=4, max_num_batched_tokens=8, overlap=False)
    first = engine.add([1, 2, 3], max_tokens=20)
    engine.step()
    long = engine.add([2] * 30, max_tokens=4)
    for start in (0, 7, 14, 21):
        engine.step()
        one, chunk = engine.plans[-1].rows[0]
        assert (one.sequence.request, one.count, one.samples) == (first, 1, True)
        assert (chunk.sequence.request, chunk.start, chunk.count, chunk.samples) == (long, start, 7, False)
    engine.step()
    assert [(row.start, row.count, row.samples) for row in engine.plans[-1].rows[0]][1] == (28, 2, True)


def test_overlap_feeds_ids_that_are_still_on_the_device() -> None:
    engine = FakeEngine()
    request = engine.add([1, 2, 3], max_tokens=6)
    plans = _run(engine)
    rows = [plan.rows[0][0] for plan in plans]
    assert [row.feeds for row in rows] == [False] + [True] * 5
    assert [row.start for row in rows] == [0, 3, 4, 5, 6, 7]
    assert request.sequences[0].finish_reason == "length" and len(plans) == 6, "no step is wasted on a known length"


def test_stop_ids_end_a_sequence_after_min_tokens() -> None:
    outputs = {}
    for name, options in {
        "long": {},
        "eos": {"eos_token_ids": frozenset({EOS})},
        "ignored": {"eos_token_ids": frozenset({EOS}), "ignore_eos": True},
        "stop": {"stop_token_ids": (EOS,), "ignore_eos": True},
        "late": {"eos_token_ids": frozenset({EOS}), "min_tokens": 30},
    }.items():
        engine = FakeEngine()
        request = engine.add([1, 2, 3], max_tokens=50, **options)
        engine.run()
        sequence = request.sequences[0]
        outputs[name] = (sequence.output, sequence.finish_reason)
    long = outputs["long"][0]
    assert EOS in long[:29] and EOS in long[29:]
    assert outputs["eos"] == outputs["stop"] == (long[: long.index(EOS) + 1], "stop")
    assert outputs["ignored"] == (long, "length")
    assert outputs["late"] == (long[: long.index(EOS, 29) + 1], "stop")


def test_nobody_starves_and_preemptions_are_bounded() -> None:
    """Memory for about four of twenty long sequences: each admission buys every sequence at least a page of progress."""
    engine = FakeEngine(max_num_seqs=20, max_num_batched_tokens=64, num_pages=41, check=False)
    requests = [engine.add([1] * 8, max_tokens=50) for _ in range(20)]
    engine.run(max_steps=1000)
    assert all(request.finished for request in requests)
    assert 0 < engine.scheduler.num_preemptions <= 40, engine.scheduler.num_preemptions
    assert requests[0].num_preemptions == 0, "the first is never preempted"


def test_watermark_keeps_pages_free_at_admission() -> None:
    free = {}
    for watermark in (0.0, 0.5):
        engine = FakeEngine(max_num_seqs=20, max_num_batched_tokens=256, num_pages=41, watermark=watermark)
        for _ in range(20):
            engine.add([1] * 8, max_tokens=50)
        engine.step()
        free[watermark] = engine.scheduler.allocator.num_available(0)
        assert engine.scheduler.num_running > 1
    assert free[0.5] >= 20 > free[0.0]


def test_preempted_sequence_finds_its_pages_again() -> None:
    engine = FakeEngine(num_pages=15, max_num_seqs=4)
    requests = [engine.add([index] * 12, max_tokens=20) for index in range(4)]
    engine.run()
    preempted = [request for request in requests if request.num_preemptions]
    assert preempted
    chunks = [
        row.start
        for plan in engine.plans
        for sequence in plan.admitted
        for row in plan.rows[0]
        if row.sequence is sequence and len(sequence.tokens) > 12
    ]
    assert any(start > 0 for start in chunks), "the prefix cache had none of the preempted tokens"


def test_prefix_cache_is_used_and_leaves_a_token_to_compute() -> None:
    engine = FakeEngine(page_size=4)
    first = engine.add(list(range(16)), max_tokens=2)
    engine.run()
    same = engine.add(list(range(16)), max_tokens=2)
    longer = engine.add([*range(16), 1, 2, 3], max_tokens=2)
    salted = engine.add(list(range(16)), max_tokens=2, cache_salt="tenant")
    engine.run()
    assert [r.num_cached_tokens for r in (first, same, longer, salted)] == [0, 12, 16, 0]
    cache = engine.scheduler.prefix_cache
    assert cache is not None and (cache.num_queries, cache.num_hits) == (16 + 16 + 19 + 16, 28)
    assert first.sequences[0].output == same.sequences[0].output == salted.sequences[0].output


@pytest.mark.parametrize("length", [1, 4, 5, 7, 8, 12])
def test_parallel_samples_prefill_once_and_copy_one_page(length: int) -> None:
    engine = FakeEngine(page_size=4, max_num_seqs=8)
    request = engine.add([1] * length, n=4, max_tokens=6)
    plans = _run(engine)
    engine.verify(request)
    assert len({tuple(sequence.output) for sequence in request.sequences}) > 1
    computed = sum(row.count for plan in plans for row in plan.rows[0])
    assert computed == length + 3 + 4 * 5, "the prompt once, its last token thrice more, and the outputs but the last"
    # Four writers of the partial last page, of which the last may keep it. If the prompt's last token opens a page,
    # the forks share only full ones. If it fills a page, the first never writes to it again, so all three copy.
    expected = 0 if length % 4 == 1 else 3
    assert engine.scheduler.num_copied_pages == expected
    assert sum(len(plan.copies[0]) for plan in plans) == expected


def test_forks_wait_for_a_slot_and_keep_their_prompt() -> None:
    engine = FakeEngine(max_num_seqs=2, enable_prefix_caching=False)
    request = engine.add([1] * 10, n=6, max_tokens=5)
    plans = _run(engine)
    engine.verify(request)
    assert sum(row.count for plan in plans for row in plan.rows[0]) == 10 + 5 + 6 * 4
    assert all(len(plan.rows[0]) <= 2 for plan in plans)


def test_waiting_forks_give_way_when_nothing_else_can_run() -> None:
    """A request of a higher priority needs the pages that forks of a finished sequence hold while they wait."""
    engine = FakeEngine(num_pages=9, max_num_seqs=1, policy="priority", enable_prefix_caching=False)
    forks = engine.add([1] * 10, n=3, max_tokens=2, priority=1)
    engine.step()
    urgent = engine.add([2] * 28, max_tokens=5, priority=0)
    engine.run()
    for request in (forks, urgent):
        engine.verify(request)
    assert (urgent.finish_time or 0) < (forks.finish_time or 0)


def test_fork_that_fills_the_pool_starts_again_on_its_own() -> None:
    """The copy of the only page needs a second one: with none, the fork must give up its share and recompute."""
    engine = FakeEngine(num_pages=2, page_size=4, max_num_seqs=2)
    request = engine.add([1, 2, 3, 4], n=3, max_tokens=1)
    engine.run()
    engine.verify(request)


def test_requests_and_their_forks_spread_over_two_shards() -> None:
    engine = FakeEngine(num_shards=2, max_num_seqs=8, max_num_batched_tokens=64, num_pages=80)
    requests = [engine.add([index] * 9, n=2, max_tokens=8) for index in range(8)]
    plans = _run(engine)
    shards: dict[str, set[int]] = {}
    for plan in plans:
        for shard, rows in enumerate(plan.rows):
            for row in rows:
                shards.setdefault(row.sequence.request.request_id, set()).add(shard)
    assert all(len(where) == 1 for where in shards.values())
    assert sum(next(iter(where)) for where in shards.values()) == len(requests) // 2, "not spread evenly"


def test_placement_follows_the_prefix() -> None:
    engine = FakeEngine(num_shards=2, num_pages=40, max_num_seqs=4)
    engine.add([1] * 20, max_tokens=2)
    engine.run()
    home = next(shard for shard in (0, 1) if engine.plans[0].rows[shard])
    engine.plans.clear()
    again = [engine.add([1] * 20, max_tokens=2) for _ in range(3)]
    engine.run()
    assert all(not plan.rows[1 - home] for plan in engine.plans)
    assert [request.num_cached_tokens for request in again] == [16, 16, 16]


def test_short_shard_sends_a_preempted_sequence_to_the_other() -> None:
    """Its token or chunk in flight on the first shard must not be taken for work on the second."""
    engine = FakeEngine(num_shards=2, num_pages=11, page_size=2, max_num_seqs=3, max_num_batched_tokens=3)
    requests = [engine.add(prompt, max_tokens=11) for prompt in prompts(30, 4, 9)]
    engine.run()
    for request in requests:
        engine.verify(request)
    where: dict[str, set[int]] = {}
    for plan in engine.plans:
        for shard, rows in enumerate(plan.rows):
            for row in rows:
                where.setdefault(row.sequence.request.request_id, set()).add(shard)
    assert any(len(shards) == 2 for shards in where.values()), "no sequence ever moved"


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_everything_at_once(steps: int) -> None:
    engine = FakeEngine(max_num_seqs=3)
    kept = engine.add([3] * 10, max_tokens=20)
    gone = engine.add([2] * 10, n=4, max_tokens=20)
    for _ in range(steps):
        engine.step()
    assert engine.scheduler.abort(gone.request_id)
    assert not engine.scheduler.abort(gone.request_id)
    engine.scheduler.check()
    assert all(sequence.table is None and sequence.finish_reason == "abort" for sequence in gone.sequences)
    events = engine.run()
    assert all(event.sequence.request is kept for event in events)
    engine.verify(kept)


def test_finishing_the_first_sample_early_leaves_the_others() -> None:
    engine = FakeEngine()
    request = engine.add([1] * 30, n=3, max_tokens=5)
    engine.step()
    engine.scheduler.finish(request.sequences[0], "abort")
    engine.run()
    engine.verify(request)
    assert [sequence.finish_reason for sequence in request.sequences] == ["abort", "length", "length"]


def test_request_that_can_never_fit_is_refused() -> None:
    engine = FakeEngine(num_pages=5, max_model_len=64)
    with pytest.raises(
        RequestError, match=r"grow to 18 tokens, which need 5 pages.*are 4: raise num_pages or kv_cache_mem"
    ):
        engine.add([1] * 10, max_tokens=8)
    with pytest.raises(RequestError, match=r"18 tokens with 2 beams, which need 8 pages.*lower beam_width, max_tokens"):
        engine.add([1] * 10, max_tokens=8, beam_width=2)
    with pytest.raises(RequestError, match=r"the context holds 64.*max_model_len"):
        engine.add([1] * 64, max_tokens=1)
    engine.add([1] * 10, max_tokens=7)
    with pytest.raises(RequestError, match="request id 'r0' is in use"):
        engine.scheduler.add(Request("r0", [1]))
    engine.run()
    engine.verify(engine.requests[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"n": 0}, "n=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens=4 is above max_tokens=3"),
    ],
)
def test_request_with_bad_values_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FakeEngine().add(**({"prompt": [1]} | options))


def test_timings_and_events() -> None:
    clock = iter(range(1000))
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2), num_pages=9, page_size=4, max_model_len=32, clock=lambda: float(next(clock))
    )
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=2))
    scheduler.add(request)
    events = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        assert plan.num_tokens == (3 if plan.index == 0 else 1)
        events += scheduler.commit(plan, [[5, 0, 0]])  # padding after the rows is ignored
    assert [(event.token_id, event.finish_reason) for event in events] == [(5, None), (5, "length")]
    assert request.sequences[0].status is Status.FINISHED
    times = [request.arrival_time, request.first_scheduled_time, request.first_token_time, request.finish_time]
    assert None not in times and times == sorted(times) and len(set(times)) == 4  # type: ignore[type-var]


def test_plans_are_committed_in_order() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=2), num_pages=9, page_size=4, max_model_len=32)
    scheduler.add(Request("r", [1, 2, 3], SamplingParams(max_tokens=9)))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    with pytest.raises(RuntimeError, match="not committed"):
        scheduler.schedule()
    with pytest.raises(RuntimeError, match="in the order"):
        scheduler.commit(second, [[0]])
    with pytest.raises(ValueError, match="0 ids for 1 rows"):
        scheduler.commit(first, [[]])


def test_check_notices_a_lost_page() -> None:
    engine = FakeEngine()
    request = engine.add([1] * 10, max_tokens=20)
    engine.step()
    table = request.sequences[0].table
    assert table is not None
    table.pages.pop()
    with pytest.raises(InvariantError):
        engine.scheduler.check()


def test_host_time_of_a_step_is_printed() -> None:
    """A loose bound, because test machines are shared; the figure itself is printed."""
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=8192), num_pages=4096, page_size=16, max_model_len=2048
    )
    for index in range(64):
        scheduler.add(Request(f"r{index}", range(index, index + 100), SamplingParams(max_tokens=1000)))
    plan, times = scheduler.schedule(), []
    for _ in range(150):
        assert plan is not None
        start = time.perf_counter()
        ahead = scheduler.schedule()
        scheduler.commit(plan, [[7] * 64])
        times.append(time.perf_counter() - start)
        plan = ahead
    times.sort()
    print(f"schedule + commit, 64 decoding sequences: median {times[75] * 1e3:.3f} ms, best {times[0] * 1e3:.3f} ms")
    assert times[0] < 5e-3


def _run(engine: FakeEngine) -> list:
    engine.run()
    return engine.plans


# The first sample is a step ahead of the others: lengths at which its last token does not begin a page.
@pytest.mark.parametrize("length", [16, 18, 19, 31])
def test_pages_of_parallel_samples_equal_the_closed_form(length: int) -> None:
    size, new = 4, 13
    for n in (1, 2, 4, 6):
        engine = FakeEngine(max_num_seqs=8, num_pages=64, enable_prefix_caching=False)
        engine.add(list(range(length)), n=n, max_tokens=new, ignore_eos=True)
        allocator, most = engine.scheduler.allocator, 0
        while engine.scheduler.has_unfinished:
            engine.step()
            most = max(most, allocator.num_usable - allocator.num_free(0))
        # All but the last prompt token are shared; of them whole pages stay shared. The last new token is never written.
        shared = (length - 1) // size
        expected = shared + n * (-(-(length + new - 1) // size) - shared)
        separate = n * -(-(length + new - 1) // size)
        print(f"prompt {length}, n={n}: {most} pages, {1 - most / separate:.0%} fewer than separate sequences")
        assert most == expected
