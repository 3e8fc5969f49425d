"""The compiled step: pool in place, few arguments, nothing compiled after warm-up; layout and buckets of the buffer."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from llm_infer.base.errors import RequestError, UserError
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.features import PLAIN, StepFeatures, features_of
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.step.layout import StepLayout, token_buckets
from llm_infer.engine.step.state import PAGES
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel, dummy_model
from pallas_kernels.paged_attention.plan import PlanShape

CONFIG = ModelConfig("LlamaForCausalLM", 64, 16, 3, 2, 1, 8, 32, 128, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG)


def make_engine(model: LoadedModel, tokens: int = 4, seqs: int = 2, pages: int = 4000) -> Engine:
    config = EngineConfig(CacheConfig(num_pages=pages), SchedulerConfig(seqs, tokens, 64))
    return Engine(model, config)


def test_pool_is_updated_in_place_and_arguments_are_few(model: LoadedModel) -> None:
    engine = make_engine(model)
    program = engine.runner.compile(2).run
    memory = program.memory_analysis()
    pool = engine.runner.state.cache[PAGES].nbytes
    assert pool > 10_000_000
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool / 50
    assert len(jax.tree.leaves(program.args_info)) <= 20


def test_nothing_compiles_after_warm_up(model: LoadedModel) -> None:
    engine = make_engine(model, tokens=8, seqs=4)
    assert list(engine.warm_up()) == [2, 4, 8]
    compiled: list[str] = []
    listener = lambda name, _seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        greedy, drawn = SamplingParams(temperature=0.0, max_tokens=9), SamplingParams(max_tokens=5, n=2, top_k=5)
        for length in (1, 7, 30):
            engine.add_request(list(range(1, length + 1)), greedy)
            engine.add_request(list(range(1, length + 1)), drawn)
        while engine.has_work:
            engine.step()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    assert engine.runner.times.compiles == 3
    assert engine.runner.times.compiles_after_warmup == 0


def test_layout_fields_do_not_overlap_and_floats_survive() -> None:
    layout = StepLayout(PlanShape(8, 4, 5, 8))
    buffer = np.zeros(layout.size, np.int32)
    for i, view in enumerate(layout.views(buffer).values()):
        view[...] = i + 0.5 if view.dtype == np.float32 else i
    unpacked = jax.jit(layout.unpack)(buffer)
    for i, name in enumerate(layout.fields):  # jit sorts the keys of a dictionary
        value = unpacked[name]
        assert value.shape == layout.fields[name]
        np.testing.assert_array_equal(value, i + 0.5 if value.dtype == np.float32 else i)


def test_token_buckets() -> None:
    assert token_buckets(512) == (2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert token_buckets(1) == (2,)
    assert token_buckets(1, 1) == (1,) and token_buckets(5, 1) == (1, 2, 4, 5)
    assert token_buckets(100) == (2, 4, 8, 16, 32, 64, 100)


def test_bad_requests_and_settings(model: LoadedModel) -> None:
    engine = make_engine(model, pages=4)
    for ids, message in (([], "empty"), ([64], "vocabulary"), ([1] * 64, "max_model_len"), ([1] * 50, "num_pages")):
        with pytest.raises(RequestError, match=message):
            engine.add_request(ids, SamplingParams(max_tokens=10))
    assert not engine.has_work
    with pytest.raises(UserError, match="max_model_len"):
        Engine(model, EngineConfig(scheduler=SchedulerConfig(max_model_len=1000)))


def test_a_step_runs_the_smallest_compiled_variant_that_its_rows_need(model: LoadedModel) -> None:
    engine = make_engine(model, tokens=2)
    with_logprobs = SamplingParams(temperature=0.0, max_tokens=2, logprobs=3)
    assert list(engine.warm_up(features=[PLAIN, features_of(with_logprobs)])) == [2, 2]
    plain, richer = (engine.runner.program(2, features) for features in (PLAIN, StepFeatures.LOGPROBS))
    assert plain is not richer
    events = []
    for params in (with_logprobs, SamplingParams(temperature=0.0, max_tokens=2)):
        request = engine.add_request([1, 2], params)
        while engine.has_work:
            events += engine.step()
        assert request.finished
    assert [event.logprobs is not None for event in events] == [True, True, False, False]
    assert engine.runner.times.compiles_after_warmup == 0
    first = events[0].logprobs
    assert first is not None and first.rank == 1 and len(first.top_ids) == 3
    assert first.top_ids[0] == events[0].token_id and first.top_logprobs[0] == first.logprob
