"""A draft model changes how many steps an output takes, never the output; one that equals the target is always right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.base.errors import UserError
from llm_infer.config import EngineConfig, SpeculativeConfig
from llm_infer.engine.engine import Engine
from llm_infer.loading import require_same_tokens
from llm_infer.models.load import LoadedModel, dummy_model
from llm_infer.text.byte_tokenizer import byte_tokenizer
from llm_infer.weights.sources import read_json
from tests.engine.engines import EngineFactory, run_all, without_clock
from tests.engine.test_speculation import CONFIG, LENGTH, requests
from tests.models.family_checkpoints import FOLDER

DRAFT = SpeculativeConfig("draft_model", 4, model="another")
PAGES = 64


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def factory(model: LoadedModel) -> Callable[[LoadedModel], EngineFactory]:
    programs: dict = {}

    def make(draft_model: LoadedModel) -> EngineFactory:
        made = EngineFactory(model, max_num_seqs=4, num_pages=PAGES, max_model_len=LENGTH, draft_model=draft_model)
        made._programs, made.buckets = programs, (8,)
        return made

    return make


def drafting(engine_of: EngineFactory, **options: object) -> Engine:
    engine = engine_of(speculative=DRAFT, **{"chunk": 8, **options})  # type: ignore[arg-type]
    without_clock(engine)
    return engine


def check_nothing_is_held(engine: Engine) -> None:
    draft_model = engine._draft_model
    assert draft_model is not None and not draft_model._holding
    assert draft_model.allocator.num_free(0) == draft_model.allocator.num_usable
    assert sorted(draft_model._free_slots[0]) == list(range(4))


def test_a_draft_model_that_equals_the_target_is_always_right(
    model: LoadedModel, factory: Callable[[LoadedModel], EngineFactory]
) -> None:
    make_engine = factory(model)
    prompts, params = requests()
    params = [replace(each, stop_token_ids=(), ignore_eos=True) for each in params]  # a stop may come within a proposal
    expected = run_all(make_engine(chunk=8, cache=False), prompts, params)
    engine = drafting(make_engine)
    assert run_all(engine, prompts, params) == expected
    assert engine.speculator is not None and engine.speculator.num_accepted == engine.speculator.num_drafted > 100
    check_nothing_is_held(engine)


def test_outputs_are_the_same_with_another_draft_model(
    model: LoadedModel, factory: Callable[[LoadedModel], EngineFactory]
) -> None:
    """A model with the target's first layer only is right now and then."""
    params = {n: p if n.startswith(("embed", "final")) else p[:1] for n, p in model.params.items()}
    small = dummy_model(replace(CONFIG, num_layers=1))
    make_engine = factory(replace(small, params=params))
    prompts, asked = requests()
    expected = run_all(make_engine(chunk=8, cache=False), prompts, asked)
    for options in ({}, {"pages": 8, "cache": False}, {"seqs": 3, "overlap": False, "steps": 8}):
        engine = drafting(make_engine, **options)
        assert run_all(engine, prompts, asked) == expected, options
        assert engine.speculator is not None
        print(options, engine.speculator.num_accepted, engine.speculator.num_drafted, engine.scheduler.num_preemptions)
        assert 0 < engine.speculator.num_accepted < engine.speculator.num_drafted
        assert (engine.scheduler.num_preemptions > 0) == ("pages" in options)
        check_nothing_is_held(engine)
    assert engine._draft_model is not None
    short = drafting(
        make_engine
    )  # fewer pages for the draft model than all sequences need: some go without or take turns
    assert short._draft_model is not None
    short._draft_model.allocator.allocate(0, short._draft_model.allocator.num_usable - 5)
    assert run_all(short, prompts, asked) == expected
    assert short.speculator is not None and short.speculator.num_drafted > 0
    assert short._draft_model.allocator.num_free(0) == 5


def test_draft_models_that_do_not_fit_are_refused(model: LoadedModel) -> None:
    other = dummy_model(replace(CONFIG, vocab_size=99, num_layers=1))
    with pytest.raises(UserError, match="vocabulary of 99 tokens"):
        Engine(model, EngineConfig(speculative=DRAFT), draft_model=other)
    short = dummy_model(replace(CONFIG, max_position_embeddings=32, num_layers=1))
    with pytest.raises(UserError, match="context is 32 tokens"):
        Engine(model, EngineConfig(speculative=DRAFT), draft_model=short)
    for speculative, draft_model in ((DRAFT, None), (None, model)):
        with pytest.raises(UserError, match="draft model is needed"):
            Engine(model, EngineConfig(speculative=speculative), draft_model=draft_model)
    with pytest.raises(UserError, match=r"'small' has another vocabulary .*it has 299 tokens, the model has 300"):
        require_same_tokens(byte_tokenizer(300), byte_tokenizer(299), "small")
    require_same_tokens(byte_tokenizer(300), byte_tokenizer(300), "small")
    for values in ({"method": "draft_model"}, {"method": "ngram", "model": "x"}):
        with pytest.raises(UserError, match="needs a model"):
            SpeculativeConfig.of(values)


def test_llm_loads_its_draft_model_like_the_model_and_gives_the_same_text(tmp_path: Path) -> None:
    config = read_json(FOLDER / "llama_gqa" / "config.json") | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    limits = {"max_model_len": 48, "max_num_seqs": 2, "max_num_batched_tokens": 8, "num_pages": 16}
    drafts = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}

    def llm(**options: object) -> LLM:
        return LLM(str(tmp_path), load_format="dummy", progress=False, **limits, **options)  # type: ignore[arg-type]

    half = llm(dtype="bfloat16", speculative_config=drafts)
    assert half.engine._draft_model is not None
    for runner in (half.engine.runner, half.engine._draft_model.runner):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(runner.model.params)} == {"bfloat16"}

    params = SamplingParams(temperature=0.8, seed=2, max_tokens=16)
    plain, drafting = llm(dtype="float32"), llm(dtype="float32", speculative_config=drafts)
    without_clock(drafting.engine)
    (expected,), (result,) = plain.generate("abcabc", params), drafting.generate("abcabc", params)
    assert result.outputs == expected.outputs
    assert result.metrics is not None and drafting.engine.times.steps < plain.engine.times.steps
    assert 0 < result.metrics.num_accepted_tokens == result.metrics.num_drafted_tokens, "the model itself drafts"

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(UserError, match=r"^the draft model '.*broken': .*5"):
        llm(speculative_config=drafts | {"model": str(broken)})
