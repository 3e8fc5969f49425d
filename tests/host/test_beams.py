"""Beams on shared pages: results of the literal search, pages as the genealogy says, groups that never get stuck."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llm_infer.base.errors import RequestError
from llm_infer.scheduler import Request
from llm_infer.scheduler.strategies.beams import Beams
from tests.host.fake_device import EOS, FakeEngine

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no overlap": {"overlap": False},
    "chunks": {"max_num_seqs": 4, "max_num_batched_tokens": 4},
    "no prefix cache": {"enable_prefix_caching": False},
    "short of pages": {"num_pages": 24},
    "short of pages, no cache, no overlap": {"num_pages": 24, "overlap": False, "enable_prefix_caching": False},
    "two shards": {"num_shards": 2, "num_pages": 24},
    "pages of one token": {"page_size": 1, "num_pages": 90},
}


def add(engine: FakeEngine, draw: random.Random, width: int, **options: Any) -> Request:
    penalty, early = draw.choice([0.0, 0.5, 1.0, 2.0, -1.0]), draw.choice([True, False, "never"])
    params = {"beam_width": width, "length_penalty": penalty, "early_stopping": early}
    prompt = [draw.randint(0, 5) for _ in range(draw.randint(1, 12))]
    ends = {"eos_token_ids": frozenset({EOS}), "ignore_eos": draw.random() < 0.3, "min_tokens": draw.choice([0, 3])}
    return engine.add(prompt, **params, max_tokens=draw.randint(4, 14), **ends, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_those_of_the_literal_search(variant: str) -> None:
    engine = FakeEngine(**({"max_num_seqs": 6} | VARIANTS[variant]))
    draw = random.Random(1)
    for index in range(10):
        add(engine, draw, draw.choice([1, 2, 3, 4]))
        engine.add([draw.randint(0, 5) for _ in range(draw.randint(3, 20))], n=1 + index % 3, max_tokens=15)
    engine.run()
    for request in engine.requests:
        assert request.finished
        engine.verify(request)
    if "short" in variant:
        assert engine.scheduler.num_preemptions > 0
    assert all(engine.scheduler.usage(shard) == 0.0 for shard in range(engine.scheduler.num_shards))


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("page_size", [2, 4, 16])
def test_pages_follow_from_the_genealogy(width: int, page_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(
        max_num_seqs=width, page_size=page_size, num_pages=400, max_model_len=128, enable_prefix_caching=False
    )
    request = engine.add([1, 2, 3, 4, 5] * 4, beam_width=width, max_tokens=60)
    lineages: list[tuple[int, ...]] = [()]  # of each beam: which beam it extended at every step
    assert isinstance(request.strategy, Beams)
    most, scheduler, search = (0, 0), engine.scheduler, request.strategy.search
    advance = search.advance

    def record(*args: Any) -> Any:
        children = advance(*args)
        if children is not None:
            lineages[:] = [(*lineages[child.parent], place) for place, child in enumerate(children)]
        return children

    search.advance = record  # type: ignore[method-assign]
    while not request.finished:
        engine.step()
        planned = engine.plans[-1].rows[0]
        if request.forked and len(planned) == width and all(beam.in_flight for beam in request.sequences):
            # The places of this step are there: two beams share a page as far as their lineages agree to its end.
            length = request.sequences[0].num_computed
            pages = 0
            for start in range(0, length, page_size):
                known = max(0, min(start + page_size, length) - len(request.prompt))
                pages += len({lineage[:known] for lineage in lineages})
            assert scheduler.allocator.num_usable - scheduler.allocator.num_free(0) == pages
            most = max(most, (pages, width * -(-length // page_size)))
    engine.verify(request)
    with capsys.disabled():
        print(
            f"\nbeams of width {width}, pages of {page_size}: {most[0]} pages, {most[1]} for separate sequences", end=""
        )
    assert most[0] < most[1]


def test_unfinished_groups_give_way_to_each_other() -> None:
    """Two groups that have each returned in part after a preemption, with no page left for the rest of either."""
    engine = FakeEngine(max_num_seqs=16, num_pages=24, policy="priority", enable_prefix_caching=False, watermark=0.0)
    draw = random.Random(3)
    for priority in (3, 2, 1, 0, 2, 3):
        add(engine, draw, 4, priority=priority)
        for _ in range(4):
            engine.step()
    engine.run()
    for request in engine.requests:
        engine.verify(request)
    assert engine.scheduler.num_preemptions > 0


def test_a_group_gives_way_where_each_waits_for_the_rest_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(
        max_num_seqs=6,
        max_num_batched_tokens=40,
        num_pages=30,
        page_size=1,
        policy="priority",
        enable_prefix_caching=False,
        watermark=0.0,
    )
    breaks, broken = engine.scheduler._break_stall, []
    monkeypatch.setattr(engine.scheduler, "_break_stall", lambda plan: breaks(plan) and not broken.append(plan))
    asked = (([0, 4, 1, 5, 4, 4, 2], 3, 5, 2), ([3, 5, 4, 1, 0], 3, 4, 8), ([1], 4, 1, 0))
    for index, (prompt, width, max_tokens, steps) in enumerate(asked):
        engine.add(prompt, beam_width=width, max_tokens=max_tokens, priority=-index, early_stopping="never")
        for _ in range(steps):
            engine.step()
    engine.run()
    for request in engine.requests:
        engine.verify(request)
    assert len(broken) == 1


def test_an_abort_gives_back_everything() -> None:
    for overlap in (False, True):
        for steps in range(1, 9):
            engine = FakeEngine(overlap=overlap)
            request = engine.add([1, 2, 3] * 4, beam_width=4, max_tokens=20)
            for _ in range(steps):
                engine.step()
            engine.scheduler.abort(request.request_id)
            engine.scheduler.check()
            engine.run()
            assert request.finished and engine.scheduler.usage() == 0.0


def test_a_group_that_can_never_run_is_refused() -> None:
    engine = FakeEngine(max_num_seqs=4, num_pages=20)
    with pytest.raises(RequestError, match="max_num_seqs"):
        engine.add([1], beam_width=5, max_tokens=2)
    with pytest.raises(RequestError, match="num_pages"):
        engine.add([1] * 8, beam_width=4, max_tokens=30)
