"""What may stand for a prompt, its priority and its salt: forms that mean the same give the same, all else is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.base.errors import RequestError
from tests.test_session import CONFIG

PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def make(path: Any, **options: Any) -> LLM:
    (path / "config.json").write_text(json.dumps(CONFIG))
    limits = dict(max_model_len=64, max_num_seqs=1, max_num_batched_tokens=16, num_pages=32, page_size=8)
    return LLM(str(path), load_format="dummy", progress=False, **(limits | options))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return make(tmp_path_factory.mktemp("model"), policy="priority")


def test_forms_of_a_prompt_mean_the_same(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Hi there")
    (expected,) = llm.generate("Hi there", PARAMS)
    for form in (
        ids,
        np.array(ids),
        {"prompt": "Hi there"},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": np.array(ids)},
    ):
        for prompts in (form, [form]):
            (result,) = llm.generate(prompts, PARAMS)
            assert result.outputs == expected.outputs and result.prompt_token_ids == ids
        assert [i for chunk in llm.stream(form, PARAMS) for i in chunk.token_ids] == expected.outputs[0].token_ids
    assert llm.generate({"prompt": "Hi there"}, PARAMS)[0].prompt == "Hi there"
    assert llm.generate({"prompt_token_ids": ids}, PARAMS)[0].prompt is None
    assert llm.generate({"prompt_token_ids": ids, "prompt": "shown"}, PARAMS)[0].prompt == "shown"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda llm: llm.generate({"prompt": "a", "multi_modal_data": 1}),
            "a prompt has the key 'multi_modal_data': expected",
        ),
        (lambda llm: llm.generate({}), "a prompt's text is None: expected {'prompt': text} or"),
        (lambda llm: llm.generate([{"prompt": 3}]), "a prompt's text is 3: expected"),
        (lambda llm: llm.generate({"prompt_token_ids": 3}), "prompt_token_ids=3: expected a list of whole numbers"),
        (
            lambda llm: llm.generate({"prompt_token_ids": "Hi"}),
            "prompt_token_ids='Hi': expected a list of whole numbers",
        ),
        (lambda llm: llm.generate({"prompt_token_ids": [1.5]}), "a flat list of whole numbers"),
        (lambda llm: llm.generate({"prompt_token_ids": []}), "the prompt is empty"),
        (
            lambda llm: llm.generate({"prompt": "a", "cache_salt": ""}),
            "cache_salt='': expected a text that is not empty",
        ),
        (lambda llm: llm.generate("a", cache_salt=3), "cache_salt=3: expected a text"),
        (lambda llm: llm.generate("a", priority="high"), "priority='high': expected a whole number, or one for each"),
        (lambda llm: llm.generate("a", priority=True), "priority=True: expected a whole number"),
        (lambda llm: llm.generate(["a", "b"], priority=[1]), "1 priorities for 2 prompts"),
    ],
)
def test_mistakes_are_named_and_run_nothing(llm: LLM, call: Callable[[LLM], object], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        call(llm)
    assert said in str(caught.value) and not llm.engine.has_work


def test_no_prompts_are_no_results(llm: LLM) -> None:
    assert llm.generate([], PARAMS) == [] and llm.embed([]) == [] and llm.score([], []) == []
    assert llm.generate([], priority=[]) == []


def test_smaller_priorities_run_first(llm: LLM) -> None:
    for priority, order in ((None, "abc"), ([2, 0, 1], "bca"), (np.array([1, 2, 0]), "cab"), (3, "abc")):
        started = [one.metrics for one in llm.generate(["a", "b", "c"], PARAMS, priority=priority)]
        assert all(started)
        queues = {name: each.queue for name, each in zip("abc", started, strict=True) if each is not None}
        assert "".join(sorted(queues, key=queues.__getitem__)) == order


def test_a_priority_that_nothing_follows_is_refused(tmp_path: Any) -> None:
    first_come = make(tmp_path)
    with pytest.raises(
        RequestError, match=r"priority=\[0, 1\]: nothing follows it; make the LLM with policy='priority'"
    ):
        first_come.generate(["a", "b"], PARAMS, priority=[0, 1])
    assert first_come.generate("a", PARAMS, priority=0)


def test_pages_are_shared_within_a_salt_only(llm: LLM) -> None:
    prompt = list(range(100, 140))

    def cached(prompt: Any, **options: Any) -> int | None:
        return llm.generate(prompt, PARAMS, **options)[0].num_cached_tokens

    assert cached(prompt) == 0 and cached(prompt) == 32
    assert cached(prompt, cache_salt="mine") == 0 and cached(prompt, cache_salt="mine") == 32
    assert cached({"prompt_token_ids": prompt, "cache_salt": "mine"}) == 32
    assert cached({"prompt_token_ids": prompt, "cache_salt": "hers"}, cache_salt="mine") == 0, "its own goes before"
    stream = llm.stream(prompt, PARAMS, cache_salt="theirs")
    assert [i for chunk in stream for i in chunk.token_ids] and cached(prompt, cache_salt="theirs") == 32


@pytest.mark.parametrize(
    "steps",
    [pytest.param(1, marks=pytest.mark.sweep), 4],  # of four, too, the first token comes of a single step
)
def test_log_probabilities_of_the_whole_vocabulary(tmp_path: Any, steps: int) -> None:
    llm = make(tmp_path, num_scheduler_steps=steps, max_num_seqs=4)
    how: dict[str, Any] = dict(max_tokens=5, ignore_eos=True, temperature=1.0, seed=1, presence_penalty=0.5)
    every, some = llm.generate(["ab", "cd"], [SamplingParams(logprobs=-1, **how), SamplingParams(logprobs=20, **how)])
    (alone,) = llm.generate("cd", SamplingParams(logprobs=-1, **how))
    assert alone.outputs[0].token_ids == some.outputs[0].token_ids
    for at, few in zip(alone.outputs[0].logprobs or [], some.outputs[0].logprobs or [], strict=True):
        assert len(at) == CONFIG["vocab_size"] and len(few) in (20, 21)
        assert np.exp([one.logprob for one in at.values()]).sum() == pytest.approx(1.0, abs=1e-5)
        for token, one in few.items():
            assert at[token].logprob == pytest.approx(one.logprob, abs=1e-5) and at[token].rank == one.rank
    assert all(len(at) == CONFIG["vocab_size"] for at in every.outputs[0].logprobs or [])
    assert (
        len([at for chunk in llm.stream("ab", SamplingParams(logprobs=-1, **how)) for at in chunk.logprobs or []]) == 5
    )


def test_log_probabilities_of_the_whole_vocabulary_are_not_for_prompts() -> None:
    with pytest.raises(
        RequestError, match=r"prompt_logprobs=-1: expected 0 to 20.*for new tokens there is logprobs=-1"
    ):
        SamplingParams(prompt_logprobs=-1)
    with pytest.raises(RequestError, match="logprobs=-2: expected a whole number from -1 to 20"):
        SamplingParams(logprobs=-2)
