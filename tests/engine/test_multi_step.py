"""Several decode steps in one program give what single steps give, in every mix, and compile nothing while they serve."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.features import StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.step.features import for_steps
from llm_infer.engine.step.state import PAGES
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel, dummy_model
from llm_infer.scheduler.plan import StepPlan
from llm_infer.scheduler.request import TokenLogprobs
from tests.engine.engines import EngineFactory

CONFIG = ModelConfig("LlamaForCausalLM", 131, 32, 2, 4, 2, 16, 64, 256, tie_word_embeddings=True)
COUNT = 21
Found = tuple[list[list[list[int]]], list[list[TokenLogprobs | None]], list[int]]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def make_engine(model: LoadedModel) -> EngineFactory:
    factory = EngineFactory(model, max_num_seqs=4, num_pages=64, max_model_len=96)
    factory.buckets = (16,)
    return factory


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Greedy and drawn, samples, penalties, allowed tokens, log-probabilities, least lengths; some stop, at many ids."""
    rng = np.random.default_rng(5)
    shared = rng.integers(1, 131, 18).tolist()
    prompts = [rng.integers(1, 131, n).tolist() for n in (1, 15, 16, 33)]
    prompts += [shared + rng.integers(1, 131, n).tolist() for n in (1, 5, 12)] + [shared]
    # All need the same features of the programs, so that few are compiled.
    common = {"max_tokens": COUNT, "presence_penalty": 0.2, "min_tokens": 1, "logprobs": 1}
    options = (
        {"temperature": 0.0},
        {"seed": 1, "n": 3, "stop_token_ids": (5, 9, 30, 77)},
        {"seed": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {7: 3.0}},
        {"seed": 3, "logprobs": 2, "top_p": 0.9},
        {"seed": 4, "min_tokens": 12, "stop_token_ids": tuple(range(20, 60))},
        {"temperature": 0.0, "allowed_token_ids": tuple(range(2, 40))},
        {"seed": 5, "n": 2, "presence_penalty": 0.5, "stop_token_ids": (8,), "logprobs": 0},
        {"temperature": 0.0, "max_tokens": 5},
    )
    return [(p, SamplingParams(**(common | o))) for p, o in zip(prompts, options, strict=True)]


def run(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> Found:
    """Outputs, log-probabilities by sequence, and the steps of each program."""
    submit, steps = engine.runner.submit, []

    def counted(plan: StepPlan) -> object:
        steps.append(plan.num_steps)
        return submit(plan)

    engine.runner.submit = counted  # type: ignore[method-assign,assignment]
    added = [engine.add_request(prompt, params) for prompt, params in asked]
    logprobs = {sequence: [] for request in added for sequence in request.sequences}
    while engine.has_work:
        for event in engine.step():
            logprobs[event.sequence].append(event.logprobs)
    assert engine.scheduler.usage(0) == 0.0
    return [[s.output for s in request.sequences] for request in added], list(logprobs.values()), steps


def check_equal(found: Found, expected: Found) -> None:
    assert found[0] == expected[0]
    for rows, others in zip(found[1], expected[1], strict=True):
        for at, other in zip(rows, others, strict=True):
            assert (at is None) == (other is None)
            if at is not None and other is not None:
                assert (at.rank, at.top_ids) == (other.rank, other.top_ids)
                np.testing.assert_allclose(
                    (at.logprob, *at.top_logprobs), (other.logprob, *other.top_logprobs), atol=1e-4
                )


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (8, {}),
        (3, {"overlap": False}),
        (8, {"pages": 6}),
        (2, {"chunk": 8, "seqs": 3, "pages": 7, "cache": False}),
    ],
)
def test_outputs_are_those_of_single_steps(make_engine: EngineFactory, steps: int, options: dict) -> None:
    expected = run(make_engine(chunk=16, cache=False, overlap=False), requests())
    assert set(expected[2]) == {1}
    engine = make_engine(steps=steps, **({"chunk": 16} | options))
    for _ in range(2):  # the second time the prefix cache is filled
        found = run(engine, requests())
        check_equal(found, expected)
        assert steps in found[2] and 1 in found[2]
        assert len(found[2]) < len(expected[2]) or "pages" in options
    assert engine.scheduler.num_copied_pages > 0
    assert engine.scheduler.num_preemptions > 0 or "pages" not in options


def test_rows_that_end_leave_the_others(make_engine: EngineFactory) -> None:
    common = {"max_tokens": COUNT, "presence_penalty": 0.2, "min_tokens": 1, "logprobs": 0}
    prompts, other = [[4, 5, 6], [9] * 5], SamplingParams(seed=3, **common)
    asked = [(prompts[0], SamplingParams(temperature=0.0, **common)), (prompts[1], other)]
    (free,), expected = run(make_engine(chunk=16), asked)[0]
    stop = SamplingParams(temperature=0.0, stop_token_ids=(free[4],), **common)
    ended = free[: free.index(free[4]) + 1]
    found = run(make_engine(chunk=16, steps=8), [(prompts[0], stop), (prompts[1], other)])
    assert found[0] == [[ended], expected] and max(found[2]) == 8


def test_programs_of_several_steps_work_in_place_and_nothing_compiles_later(model: LoadedModel) -> None:
    config = EngineConfig(CacheConfig(num_pages=4000), SchedulerConfig(4, 8, 64, num_scheduler_steps=4))
    engine = Engine(model, config)
    assert sorted(engine.warm_up()) == [2, 2, 4, 4, 8]
    program = engine.runner.compile(4, StepFeatures.STEPS)
    memory, pool = program.run.memory_analysis(), engine.runner.state.cache[PAGES].nbytes
    assert memory.alias_size_in_bytes >= pool and memory.temp_size_in_bytes < pool / 20
    compiled: list[str] = []
    listener = lambda name, _seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        asked = [([1] * n, SamplingParams(temperature=n % 2 * 1.0, n=1 + n % 2, max_tokens=9)) for n in (1, 7, 30)]
        assert max(run(engine, asked)[2]) == 4
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == [] and engine.runner.times.compiles_after_warmup == 0
    assert for_steps(StepFeatures.DRAFTS | StepFeatures.LOGPROBS) == StepFeatures.LOGPROBS | StepFeatures.STEPS
