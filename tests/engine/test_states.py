"""Engines over models with short convolutions: many together, from cached prefixes, after new weights, and in place."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from llm_infer.base.errors import RequestError, UserError
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.memory import local_bytes
from llm_infer.models.load import LoadedModel
from tests.engine.engines import EngineFactory, greedy, run_all
from tests.models.family_checkpoints import golden, load


@cache
def model() -> LoadedModel:
    return load("lfm2_gqa")


@cache
def factory() -> EngineFactory:
    made = EngineFactory(model(), max_num_seqs=24, num_pages=140, max_model_len=64)
    made.buckets = (24, 64)
    return made


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, model().config.vocab_size, 1 + 5 * i % 37).tolist() for i in range(count)]


def test_24_together_in_chunks_of_odd_sizes_give_what_each_gives_alone() -> None:
    make, asked = factory(), prompts(24)
    alone = make(cache=False, overlap=False)
    expected = [greedy(alone, [prompt], [20])[0] for prompt in asked]
    for chunk, steps in ((24, 1), (64, 1), (37, 4)):
        assert greedy(make(chunk=chunk, steps=steps), asked, [20] * 24) == expected, (chunk, steps)
    few = make(chunk=64, pages=24)
    assert greedy(few, asked, [20] * 24) == expected
    assert few.scheduler.num_preemptions > 0


def test_golden_tokens_from_a_cached_prefix_with_proposals_and_several_samples() -> None:
    wanted = golden("lfm2_gqa")
    counts = [len(tokens) for tokens in wanted.tokens]
    for speculative in (None, SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=1)):
        engine = factory()(speculative=speculative)
        for _ in range(2):
            assert greedy(engine, wanted.prompts, counts) == wanted.tokens
        cache = engine.scheduler.prefix_cache
        assert cache is not None and cache.num_hits > 0
        several = SamplingParams(temperature=0.0, n=3, max_tokens=counts[0], ignore_eos=True)
        assert run_all(engine, wanted.prompts[:1], several) == [[wanted.tokens[0]] * 3]


def test_a_conversation_goes_on_from_behind_the_last_answer() -> None:
    engine = factory()()
    (first,) = greedy(engine, prompts(6)[5:], [20])
    follow = [*prompts(6)[5], *first, 5, 6]
    request = engine.add_request(follow, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    while engine.has_work:
        engine.step()
    computed = len(prompts(6)[5]) + 19
    assert request.num_cached_tokens == computed // 16 * 16 > len(prompts(6)[5])
    assert request.sequences[0].output == greedy(factory()(cache=False), [follow], [4])[0]


def test_new_weights_forget_states() -> None:
    wanted, engine = golden("lfm2_gqa"), factory()()
    counts = [len(tokens) for tokens in wanted.tokens]
    others = {name: value if "norm" in name else -value for name, value in model().params.items()}
    greedy(engine, wanted.prompts, counts)
    engine.set_weights(replace(model(), params=others), "other")
    changed = greedy(engine, wanted.prompts, counts)
    engine.set_weights(model(), "first")
    assert changed != wanted.tokens == greedy(engine, wanted.prompts, counts)


def test_a_step_copies_neither_pages_nor_states() -> None:
    cache = CacheConfig(num_pages=500, num_state_snapshots=5000)
    engine = Engine(model(), EngineConfig(cache, SchedulerConfig(8, 32, 64, num_scheduler_steps=4)))
    steps = engine.runner.step_programs
    pools = local_bytes(steps.cache(500))
    assert local_bytes(steps.states()) > pools / 2
    for features in (PLAIN, StepFeatures.STEPS):
        memory = steps.lower(8, features, 500).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= pools and memory.temp_size_in_bytes < pools / 8


def test_refusals() -> None:
    limits = SchedulerConfig(4, 32, 64)
    speculative = SpeculativeConfig("draft_model", 2, model="itself")
    with pytest.raises(UserError, match="a draft model of Lfm2ForCausalLM is not supported"):
        Engine(model(), EngineConfig(CacheConfig(num_pages=20), limits, speculative=speculative), draft_model=model())
    with pytest.raises(UserError, match="num_state_snapshots=-1: expected 0 or more"):
        CacheConfig(num_state_snapshots=-1)
    engine = Engine(model(), EngineConfig(CacheConfig(num_pages=9), limits))
    beams = SamplingParams(beam_width=3, max_tokens=20, temperature=0.0)
    with pytest.raises(
        RequestError, match="with 3 beams, which need 12 pages"
    ):  # that share nothing once they were preempted
        engine.add_request(prompts(8)[7], beams)
