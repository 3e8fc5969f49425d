"""A warm-up knows its programs before it compiles them, and requests need no others: with proposals, several steps, a draft."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.programs import StepPrograms
from llm_infer.engine.warm_up import WarmUp, prefill_sizes
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel, dummy_model

DRAFT = SpeculativeConfig("draft_model", 3, model="x")
CONFIG = ModelConfig("LlamaForCausalLM", 131, 32, 1, 4, 2, 16, 64, 256, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG, seed=3)


def engine_of(model: LoadedModel, *, steps: int = 1, speculative: SpeculativeConfig | None = None) -> Engine:
    config = EngineConfig(
        CacheConfig(num_pages=32), SchedulerConfig(2, 8, 64, num_scheduler_steps=steps), speculative=speculative
    )
    drafts = speculative is not None and speculative.model is not None
    return Engine(model, config, draft_model=model if drafts else None)


def compiled(engine: Engine) -> int:
    drafting = engine._draft_model
    return engine.runner.times.compiles + (0 if drafting is None else drafting.runner.times.compiles)


def compile_all(engine: Engine, programs: WarmUp) -> int:
    count, before = len(programs), compiled(engine)
    assert len(list(programs)) == count == compiled(engine) - before
    return count


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 4}, "step programs (several tokens a step)"),
        ({"speculative": DRAFT}, "step programs (proposed tokens, draft model)"),
    ],
    ids=["steps", "draft model"],
)
def test_requests_compile_what_they_need_before_their_first_step(
    model: LoadedModel, options: dict[str, Any], named: str
) -> None:
    engine = engine_of(model, **options)
    prompts = [[1, 2, 3] * 6, [1, 2, 3, 1], [4, 5, 4, 5, 4]]
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (14, 9, 12)]
    requests = [engine.add_request(*each) for each in zip(prompts, params, strict=True)]
    programs = engine.warm_up_for(requests)
    assert str(programs) == named
    assert compile_all(engine, programs) > 2
    assert len(engine.warm_up_for(requests)) == 0
    before = compiled(engine)
    while engine.has_work:
        engine.step()
    assert compiled(engine) == before
    if engine.speculator is not None:
        assert engine.speculator.num_drafted > 0


def test_what_is_cached_and_what_never_decodes_needs_fewer_programs(model: LoadedModel) -> None:
    engine = engine_of(model)
    only = engine.warm_up_for([engine.add_request(list(range(1, 17)), SamplingParams(temperature=0.0, max_tokens=1))])
    assert str(only) == "step programs" and compile_all(engine, only) == 1, "the prompt's, and none that decodes"
    while engine.has_work:
        engine.step()
    again = engine.warm_up_for([engine.add_request([*range(1, 17), 7, 8], SamplingParams(max_tokens=4))])
    assert compile_all(engine, again) == 1, "two tokens are left of the prompt, and steps have two rows at least"


def test_warming_up_for_everything_leaves_nothing_to_compile(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, speculative=DRAFT)
    monkeypatch.setattr(StepPrograms, "lower", lambda *_, **__: SimpleNamespace(compile=lambda: None))  # nothing runs
    programs = engine.warm_up(features=[PLAIN, StepFeatures.LOGPROBS])
    # Three buckets of the model: plain, with proposals (whose programs serve nothing more), and those with log-probabilities.
    drafting = engine._draft_model
    assert drafting is not None and engine.runner.buckets == (2, 4, 8)
    assert compile_all(engine, programs) == 3 * 3 + 3 + 1
    assert engine.runner.is_warm and drafting.runner.is_warm
    assert len(engine.warm_up([3, 8], [StepFeatures.LOGPROBS])) == 0
    shown = SamplingParams(logprobs=1, prompt_logprobs=1, max_tokens=2)
    assert str(engine.warm_up_for([engine.add_request([1, 2, 3], shown)])) == (
        "step programs (log-probabilities, log-probabilities of prompts, proposed tokens, most likely tokens)"
    )


def test_sizes_of_the_steps_of_prompts() -> None:
    assert prefill_sizes([7], 4, 16) == [7]
    assert prefill_sizes([7, 5], 4, 16) == [12]
    assert prefill_sizes([40], 4, 16) == [16, 8]
    assert prefill_sizes([40, 2], 4, 16) == [16, 11]
    assert prefill_sizes([3, 4, 9, 5], 2, 16) == [7, 10, 6, 14]
