"""What a request of a new kind needs is compiled by its own thread: others go on meanwhile, and no step compiles for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.base.errors import CapacityError, RequestError
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.engine.programs import StepPrograms
from llm_infer.engine.runner import Runner, StepProgram
from llm_infer.frontend import session
from tests.test_session import CONFIG

STREAM = SamplingParams(temperature=1.0, seed=4, max_tokens=50, ignore_eos=True)
SHORT = dict(temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
NEW_KINDS = {
    "logprobs": SamplingParams(**SHORT, logprobs=2),
    "prompt_logprobs": SamplingParams(**SHORT, prompt_logprobs=2),
    "penalties": SamplingParams(**SHORT, presence_penalty=1.0),
    "allowed": SamplingParams(**SHORT, allowed_token_ids=[5, 6, 7]),
    "beams": SamplingParams(beam_width=2, max_tokens=6, ignore_eos=True),
    "samples": SamplingParams(**SHORT, n=3, logprobs=0),
}

OFTEN = (("logprobs", 30), ("samples", 2))
"""Kinds and lengths of prompts that are always tried."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def shared(directory: str) -> LLM:
    return make(directory)


def make(directory: str) -> LLM:
    limits = dict(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=8, num_pages=64)
    return LLM(directory, load_format="dummy", progress=False, check_every_step=True, **limits)


@pytest.fixture
def llm(directory: str, shared: LLM) -> Iterator[LLM]:
    """One whose programs are yet to be compiled."""
    shared.engine.runner._programs.clear()
    yield shared
    assert not shared.engine.has_work and shared.engine.scheduler.usage(0) == 0.0 and not shared._session._running


def watch_compiles(monkeypatch: pytest.MonkeyPatch, do: Callable[[StepFeatures], None]) -> None:
    """Has `do` called by the thread that compiles a program, before it does."""
    compile_ = Runner.compile

    def watched(runner: Runner, bucket: int, features: StepFeatures = PLAIN) -> StepProgram:
        if (bucket, features) not in runner._programs:
            do(features)
        return compile_(runner, bucket, features)

    monkeypatch.setattr(Runner, "compile", watched)


def test_a_stream_goes_on_while_another_request_waits_in_a_compile(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [i for chunk in llm.stream([1, 2, 3], STREAM) for i in chunk.token_ids]
    compiling, go_on = threading.Event(), threading.Event()

    def hold(features: StepFeatures) -> None:
        if StepFeatures.LOGPROBS in features:
            compiling.set()
            assert go_on.wait(30), "nobody let the compile go on"

    watch_compiles(monkeypatch, hold)
    stream = llm.stream([1, 2, 3], STREAM)
    found = next(stream).token_ids
    with ThreadPoolExecutor(1) as pool:
        try:
            other = pool.submit(llm.generate, [9, 8, 7], NEW_KINDS["logprobs"])
            assert compiling.wait(30)
            for _ in range(20):  # were the turn taken, this would not come back
                found += next(stream).token_ids
            assert not other.done()
        finally:
            go_on.set()
        (result,) = other.result(timeout=60)
    found += [i for chunk in stream for i in chunk.token_ids]
    assert found == whole and len(found) == 50
    assert result.outputs == llm.generate([9, 8, 7], NEW_KINDS["logprobs"])[0].outputs
    assert len(result.outputs[0].logprobs or ()) == 6


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        pytest.param(kind, length, marks=() if (kind, length) in OFTEN else pytest.mark.sweep)
        for kind in NEW_KINDS
        for length in (2, 30)
    ],
)
def test_no_step_compiles_for_a_request_that_joins_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: str, prompt: int
) -> None:
    """The streams have a prompt in chunks left when the new request comes, and decode when it goes."""
    in_a_turn: list[StepFeatures] = []
    session_of = llm._session

    def note(features: StepFeatures) -> None:
        if session_of._owned:
            in_a_turn.append(features)

    watch_compiles(monkeypatch, note)
    streams = [llm.stream(list(range(1, 40)), STREAM), llm.stream([4, 5], STREAM)]
    for stream in streams:
        next(stream)
    late = session_of.submit(list(range(2, 41)), STREAM)
    (result,) = llm.generate(list(range(3, 3 + prompt)), NEW_KINDS[kind])
    assert all(output.finish_reason == "length" for output in result.outputs)
    for stream in streams:
        assert sum(len(chunk.token_ids) for chunk in stream) == 49
    while not late.finished:
        session_of.step()
    assert not in_a_turn


def test_requests_of_two_new_kinds_that_come_at_once_both_run(llm: LLM) -> None:
    kinds = [NEW_KINDS["penalties"], NEW_KINDS["allowed"]]
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(llm.generate, [7, 8, number], each) for number, each in enumerate(kinds, 9)]
        together = [each.result(timeout=120)[0].outputs for each in asked]
    alone = [llm.generate([7, 8, number], each)[0].outputs for number, each in enumerate(kinds, 9)]
    assert [[o.token_ids for o in outputs] for outputs in together] == [
        [o.token_ids for o in outputs] for outputs in alone
    ]


def test_programs_that_several_need_at_once_are_compiled_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[int, StepFeatures]] = []
    compile_ = StepPrograms.lower

    def note(steps: StepPrograms, bucket: int, features: StepFeatures, *args: Any, **kwargs: Any) -> Any:
        compiled.append((bucket, features))
        return compile_(steps, bucket, features, *args, **kwargs)

    monkeypatch.setattr(StepPrograms, "lower", note)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: llm.generate([1, 2, 3], NEW_KINDS["logprobs"]), range(3)))
    assert compiled and len(set(compiled)) == len(compiled)


def test_a_request_does_not_look_for_programs_for_ever(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    monkeypatch.setattr(session.Session, "compile", lambda _, programs: tries.append(len(programs)))
    (result,) = llm.generate([1, 2, 3], NEW_KINDS["logprobs"])
    assert len(result.outputs[0].token_ids) == 6 and len(tries) == session.MAX_TRIES - 1


def test_a_compile_that_fails_is_the_error_of_its_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream([1, 2, 3], STREAM)
    found = next(stream).token_ids

    def fail(_: StepFeatures) -> None:
        raise CapacityError("the step does not fit: lower max_num_seqs")

    with monkeypatch.context() as patch:
        watch_compiles(patch, fail)
        with pytest.raises(CapacityError, match="lower max_num_seqs"):
            llm.generate([4, 5], NEW_KINDS["penalties"])
    assert len(found + [i for chunk in stream for i in chunk.token_ids]) == 50


def test_a_request_that_is_aborted_by_another_thread_ends(llm: LLM) -> None:
    request = llm._session.submit([1, 2, 3], STREAM)
    other = llm._session.submit([1, 2, 3, 4], STREAM)
    llm._session.step()
    llm._session.abort(request)
    while not (request.finished and other.finished):
        llm._session.step()
    assert request.result().outputs[0].finish_reason == "abort"
    assert len(other.result().outputs[0].token_ids) == 50


def test_a_closed_session_ends_what_runs_and_takes_nothing_new(directory: str) -> None:
    llm = make(directory)
    stream = llm.stream([1, 2, 3], STREAM)
    next(stream)
    llm._session.close()
    assert [chunk.finish_reason for chunk in stream][-1] == "abort"
    with pytest.raises(RequestError, match="this session is closed"):
        llm.generate([1, 2], STREAM)
    assert not llm.engine.scheduler.has_unfinished
