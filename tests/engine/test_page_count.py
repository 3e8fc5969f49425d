"""The page count from the compiler's analysis: the largest that stays within the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_infer.base.errors import CapacityError
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.engine.engine import Engine
from llm_infer.engine.memory import (
    device_bytes,
    free_memory,
    memory_limit,
    out_of_memory_names_the_setting,
    physical_memory,
)
from llm_infer.engine.page_count import LARGEST, page_bytes, pages_that_fit
from llm_infer.engine.programs import StepPrograms
from llm_infer.engine.runner import Runner
from llm_infer.engine.step.state import PAGES
from tests.models.family_checkpoints import load


def program(weights: int, page: int, rest: int, copied: int, refuses_above: int) -> Callable[[int], int | None]:
    """A compiler's answers: `copied` of every page's bytes are held twice."""

    def measure(pages: int) -> int | None:
        total = weights + pages * (page + copied) + rest
        return None if total > refuses_above else total

    return measure


@given(
    weights=st.integers(0, 10_000),
    page=st.integers(1, 500),
    rest=st.integers(0, 3_000),
    copied_share=st.sampled_from([0, 0, 0.5, 1]),
    utilization=st.sampled_from([0.5, 0.9, 1.0]),
    max_pages=st.integers(2, 400),
)
def test_the_program_stays_within_and_one_page_more_would_not(
    weights: int, page: int, rest: int, copied_share: float, utilization: float, max_pages: int
) -> None:
    limit, copied = 20_000, int(page * copied_share)
    budget = int(limit * utilization)
    measure = program(weights, page, rest, copied, refuses_above=limit)
    best = min(max_pages, (budget - weights - rest) // (page + copied))
    arguments = {
        "limit": limit,
        "utilization": utilization,
        "weights": weights,
        "page_bytes": page,
        "max_pages": max_pages,
    }
    if best < 2:
        with pytest.raises(CapacityError, match="raise memory_utilization"):
            pages_that_fit(measure, **arguments)
        return
    try:
        pages = pages_that_fit(measure, **arguments)
    except CapacityError:
        assert copied or measure(min(max_pages, (budget - weights) // page)) is None  # only then may it fall short
        return
    assert weights + pages * (page + copied) + rest <= budget
    if not copied and measure(min(max_pages, (budget - weights) // page)) is not None:
        assert pages == best


def test_a_refused_program_is_tried_with_fewer_pages() -> None:
    asked = []

    def measure(pages: int) -> int | None:
        asked.append(pages)
        return None if pages > 80 else 100 + 10 * pages

    assert pages_that_fit(measure, limit=1000, utilization=1.0, weights=50, page_bytes=10, max_pages=10**6) == 86
    assert asked == [95, 47]  # 90 would fit, if what is no page did not grow


LIMIT = 8 << 20
"""Bytes of a device that the tests pretend to have."""


def limited(utilization: float) -> Engine:
    """Small steps, so that the program compiles fast, and sequences that could fill any number of pages."""
    model = load("llama_gqa")
    model = replace(model, config=replace(model.config, max_position_embeddings=100_000))
    config = EngineConfig(CacheConfig(memory_utilization=utilization), SchedulerConfig(4, 4))
    return Engine(model, config, device_memory=LIMIT)


def test_the_compiled_engine_stays_within_the_limit_and_a_page_more_would_not() -> None:
    engine = limited(0.8)
    steps, pages = engine.runner.step_programs, engine.scheduler.allocator.num_usable + 1
    assert engine.runner.state.cache[PAGES].shape[1] == pages == engine.runner.num_pages
    taken = device_bytes(steps.lower(4, LARGEST, pages).compile())
    assert taken <= 0.8 * LIMIT < taken + page_bytes(steps)


def test_weights_that_leave_no_room_are_refused() -> None:
    with pytest.raises(CapacityError, match=r"memory_utilization=0.01 of 0.01 GB .* raise memory_utilization"):
        limited(0.01)


def test_running_out_of_memory_names_the_setting() -> None:
    with pytest.raises(CapacityError, match="lower memory_utilization"), out_of_memory_names_the_setting():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory_names_the_setting():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_the_limit_of_a_cpu_is_what_the_machine_has_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemFree:  1000 kB\nMemAvailable:  3000 kB\n")
    assert free_memory(str(meminfo)) == 3000 << 10
    assert free_memory(str(tmp_path / "none")) == physical_memory()
    assert 0 < free_memory() <= physical_memory()
    monkeypatch.setattr("llm_infer.engine.memory.free_memory", lambda: 1 << 20)
    assert memory_limit(jax.devices()) == (1 << 20) // len(jax.devices())


def test_pages_of_a_draft_model_hold_all_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = load("gemma3_gqa"), {}  # three layers, each with a page of its own where windows give some back

    def choose(steps: StepPrograms, largest: int, limit: int | None, beside: StepPrograms) -> int:
        found["own"], found["beside"] = page_bytes(steps), page_bytes(beside)
        return 40

    monkeypatch.setattr("llm_infer.engine.runner.choose_num_pages", choose)
    config = EngineConfig(CacheConfig(), SchedulerConfig(2, 4))
    Runner(model, config, max_model_len=48, draft_model=model)
    assert found["beside"] == 3 * found["own"]
