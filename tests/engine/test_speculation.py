"""Speculation changes how many steps an output takes, never the output: greedy and drawn, in every mix."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.features import PLAIN, features_of
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel, dummy_model
from tests.engine.engines import EngineFactory, run_all, without_clock

CONFIG = ModelConfig("LlamaForCausalLM", 131, 32, 2, 4, 2, 16, 64, 256, tie_word_embeddings=True)
LENGTH = 96
COUNT = 24
NGRAM = SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_max=3, prompt_lookup_min=1)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def make_engine(model: LoadedModel) -> EngineFactory:
    return EngineFactory(model, max_num_seqs=8, num_pages=64, max_model_len=LENGTH)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy ones, drawn ones, some with samples; half of the prompts share a beginning and repeat it."""
    rng = np.random.default_rng(5)
    shared = rng.integers(1, 131, 18).tolist()
    prompts = [rng.integers(1, 131, n).tolist() for n in (1, 15, 16, 33)]
    prompts += [shared + rng.integers(1, 131, n).tolist() + shared[:9] for n in (1, 5, 12)] + [shared * 2]
    greedy = partial(SamplingParams, temperature=0.0, max_tokens=COUNT, ignore_eos=True)
    drawn = partial(SamplingParams, temperature=0.4, top_k=5, max_tokens=COUNT)
    params = [greedy(), drawn(seed=1, n=2), greedy(stop_token_ids=(5, 9)), drawn(seed=2), greedy(), drawn(seed=3, n=3)]
    return prompts, [*params, greedy(), drawn(seed=4)]


# Chunk, sequences, pages, prefix cache, overlap: the rows of the equivalence test that differ most.
ROWS = [
    (8, 8, 64, True, True),
    (8, 8, 8, False, True),
    (8, 3, 12, True, False),
    (8, 1, 64, False, False),
]


@pytest.mark.parametrize(("chunk", "seqs", "pages", "cache", "overlap"), ROWS)
def test_outputs_are_the_same_with_and_without(
    make_engine: EngineFactory, chunk: int, seqs: int, pages: int, cache: bool, overlap: bool
) -> None:
    prompts, params = requests()
    expected = run_all(make_engine(chunk=8, cache=False), prompts, params)
    engine = make_engine(chunk=chunk, seqs=seqs, pages=pages, cache=cache, overlap=overlap, speculative=NGRAM)
    without_clock(engine)
    for _ in range(2):
        assert run_all(engine, prompts, params) == expected
    assert engine.speculator is not None
    print(f"drafted {engine.speculator.num_drafted}, accepted {engine.speculator.num_accepted}")
    assert 0 < engine.speculator.num_accepted < engine.speculator.num_drafted
    assert engine.scheduler.num_preemptions > 0 or pages == 64 or seqs == 3


def test_nothing_is_proposed_for_requests_whose_rules_look_back(make_engine: EngineFactory) -> None:
    engine = make_engine(chunk=8, speculative=NGRAM)
    for options in ({"logprobs": 1}, {"min_tokens": 2}, {"presence_penalty": 1.0}, {"beam_width": 2}):
        assert not engine.add_request([5, 6] * 12, SamplingParams(**options)).speculate
    assert engine.add_request([5, 6] * 12, SamplingParams()).speculate


def test_nothing_compiles_after_warm_up_whatever_is_proposed(model: LoadedModel) -> None:
    config = EngineConfig(CacheConfig(num_pages=32), SchedulerConfig(1, 2, LENGTH), speculative=NGRAM)
    engine = Engine(model, config)
    penalties = SamplingParams(temperature=0.0, max_tokens=6, repetition_penalty=1.2)
    assert list(engine.warm_up(features=[PLAIN, features_of(penalties)])) == [2, 2, 2]
    for params in (SamplingParams(temperature=0.0, max_tokens=COUNT), penalties, SamplingParams(seed=1, n=2)):
        engine.add_request([5, 6, 7, 5, 6, 7, 5], params)
    while engine.has_work:
        engine.step()
    assert engine.speculator is not None and engine.speculator.num_drafted > 0
    assert engine.runner.times.compiles == 3 and engine.runner.times.compiles_after_warmup == 0
