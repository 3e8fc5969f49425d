"""Every sampling parameter at once gives the same tokens alone, in a mixed batch, preempted and chunked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from llm_infer.base.errors import RequestError
from llm_infer.decoding.features import features_of
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import dummy_model
from tests.engine.engines import EngineFactory, run_all

CONFIG = ModelConfig("LlamaForCausalLM", 131, 32, 2, 4, 2, 16, 64, 256, tie_word_embeddings=True)
COUNT = 20
BAD = [(9,), (30, 31)]


@pytest.fixture(scope="module")
def make_engine() -> EngineFactory:
    return EngineFactory(dummy_model(CONFIG, seed=3), max_num_seqs=8, num_pages=64, max_model_len=96)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    shared = rng.integers(1, 131, 33).tolist()
    return [rng.integers(1, 131, n).tolist() for n in (1, 16, 17, 33)] + [[*shared, n] for n in range(1, 5)]


def params(i: int) -> SamplingParams:
    if i % 4 == 3:  # a plain neighbour
        return SamplingParams(temperature=0.0 if i == 3 else 1.0, seed=i, max_tokens=COUNT, ignore_eos=True)
    return SamplingParams(
        n=1 + i % 2,
        temperature=1.3,
        top_k=90 if i % 2 else 40,
        top_p=0.97,
        min_p=0.001,
        typical_p=0.95,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={5: 3.0, 6: -100.0, 40: 2.0},
        allowed_token_ids=tuple(range(120)),
        bad_words=("bad",),
        seed=i,
        max_tokens=COUNT,
        min_tokens=16,
        stop_token_ids=(5,),
        logprobs=2,
    )


def run(engine_of: EngineFactory, which: list[int], **options: object) -> tuple[list, list]:
    engine = engine_of(**options)  # type: ignore[arg-type]
    add, logprobs = engine.add_request, {}
    engine.add_request = lambda ids, param: add(ids, param, bad_words=BAD if param.bad_words else ())  # type: ignore[method-assign]
    step = engine.step

    def recorded() -> list:
        events = step()
        for event in events:
            if event.logprobs is not None:
                logprobs.setdefault(event.sequence, []).append(event.logprobs.logprob)
        return events

    engine.step = recorded  # type: ignore[method-assign]
    outputs = run_all(engine, [prompts()[i] for i in which], [params(i) for i in which])
    if options.get("pages"):
        assert engine.scheduler.num_preemptions > 0
    return outputs, [logprobs[s] for s in sorted(logprobs, key=lambda s: s.rank)]


def test_all_parameters_alone_and_in_every_company(make_engine: EngineFactory) -> None:
    everyone = list(range(8))
    alone = [run(make_engine, [i], cache=False, overlap=False) for i in everyone]
    expected = [outputs[0] for outputs, _ in alone]
    scores = [row for _, rows in alone for row in rows]
    for options in (
        {},
        {"pages": 7, "chunk": 32, "cache": False},
        {"chunk": 8, "seqs": 3},
        {"overlap": False, "cache": False},
    ):
        outputs, found = run(make_engine, everyone, **options)
        assert outputs == expected, options
        for a, b in zip(found, scores, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    for i, samples in enumerate(expected):
        for output in samples if i % 4 != 3 else ():
            assert 16 <= len(output) <= COUNT and 5 not in output[:15] and max(output) < 120
            assert output[-1] == 5 or len(output) == COUNT
            assert 6 not in output and 9 not in output and (30, 31) not in pairwise(output)


def test_a_request_that_no_token_can_continue_ends_alone(make_engine: EngineFactory) -> None:
    engine = make_engine()
    stuck = SamplingParams(temperature=0.0, allowed_token_ids=(7,), bad_words=("bad",), max_tokens=5)
    dead = engine.add_request([1, 2], stuck, bad_words=[(7, 7)])
    other = engine.add_request([1, 2], SamplingParams(temperature=0.0, max_tokens=5))
    while engine.has_work:
        engine.step()
    assert dead.sequences[0].output == [7] and dead.sequences[0].finish_reason == "error"
    assert "drop some of bad_words" in (dead.sequences[0].error or "")
    assert len(other.sequences[0].output) == 5
    assert engine.scheduler.usage(0) == 0.0
    with pytest.raises(RequestError, match="bad_words"):
        engine.add_request([1], stuck, bad_words=[(7,)])
    ends = SamplingParams(allowed_token_ids=(7, 9), stop_token_ids=(7, 9, 11), min_tokens=1)
    with pytest.raises(RequestError, match=r"allowed_token_ids and min_tokens=1 .*lower min_tokens"):
        engine.add_request([1], ends)
    assert not engine.scheduler.has_unfinished


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_tokens_outside_the_vocabulary_are_named(make_engine: EngineFactory, name: str) -> None:
    value = {131: 1.0} if name == "logit_bias" else [131]
    with pytest.raises(RequestError, match=rf"{name} has token 131, the vocabulary ends at 130"):
        make_engine().add_request([1], SamplingParams(**{name: value}))


def test_features_follow_the_parameters() -> None:
    assert not features_of(SamplingParams(top_k=3, min_p=0.1, typical_p=0.5, seed=1, stop=["x"]))
    assert len(features_of(params(0))) == 4  # log-probabilities of drawn and of most likely tokens are two


def test_penalties_count_a_prompt_that_came_in_chunks(make_engine: EngineFactory) -> None:
    """The first steps of such a prompt draw nothing, so they run programs that know no penalties."""
    prompt = prompts()[3]
    penalised = SamplingParams(temperature=0.0, max_tokens=4, repetition_penalty=1.5, logit_bias={7: 2.0})
    fresh = EngineFactory(
        make_engine.model, max_num_seqs=2, num_pages=8, max_model_len=48
    )  # its first program is plain
    chunked, whole = (run_all(fresh(chunk=chunk, cache=False), [prompt], penalised) for chunk in (16, 64))
    assert chunked == whole
