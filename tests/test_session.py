"""Whatever strikes in the middle of a step (a finalizer, Ctrl-C, a failure, a fork) harms no other request and no later one."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import warnings
from collections.abc import Iterator

import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.base.errors import RequestError, UserError
from tests.every_line import at_line

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    **dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    **dict(head_dim=16, intermediate_size=64, max_position_embeddings=1024, tie_word_embeddings=True),
}
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=5, ignore_eos=True, n=2, stop=["~~~~"])
PROMPT = [5, 6, 7]
LONG = SamplingParams(temperature=1.0, seed=4, max_tokens=40, ignore_eos=True)
EVERY = 121
"""Lines between two tries; the sweep tries ten times as many."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    limits = dict(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=8, num_pages=32)
    return LLM(str(path), load_format="dummy", progress=False, check_every_step=True, **limits)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    return tokens(llm)


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    assert tokens(llm) == tokens(llm)
    llm.engine.scheduler.check()
    assert not llm.engine.has_work and llm.engine.scheduler.usage(0) == 0.0 and not llm._session._running


def tokens(llm: LLM) -> list[list[int]]:
    (result,) = llm.generate(PROMPT, PARAMS)
    assert [output.finish_reason for output in result.outputs] == ["length"] * 2
    return [output.token_ids for output in result.outputs]


def lines(llm: LLM, step: int) -> range:
    """Numbers of lines of a call, `step` apart."""
    return range(1, at_line(0, lambda: None, lambda: tokens(llm)), step)


def free_streams(llm: LLM, expected: list[list[int]], step: int) -> int:
    tried = 0
    for number in lines(llm, step):
        stream = llm.stream([9] * 20, LONG)
        next(stream)
        at_line(number, stream.close, lambda: check(llm, expected))  # type: ignore[attr-defined]
        tried += 1
    return tried


def check(llm: LLM, expected: list[list[int]]) -> None:
    assert tokens(llm) == expected


def test_a_stream_that_is_freed_inside_a_step_harms_nobody(llm: LLM, expected: list[list[int]]) -> None:
    assert free_streams(llm, expected, EVERY) > 20


@pytest.mark.sweep
def test_a_stream_that_is_freed_at_more_lines(llm: LLM, expected: list[list[int]]) -> None:
    print(free_streams(llm, expected, EVERY // 10), "lines")


def test_a_stream_in_a_cycle_is_freed_by_the_garbage_collector_in_a_step(llm: LLM, expected: list[list[int]]) -> None:
    for number in list(lines(llm, 5 * EVERY)):
        stream = llm.stream([9] * 20, LONG)
        next(stream)
        cycle: list = [stream]
        cycle.append(cycle)
        del stream, cycle
        at_line(number, gc.collect, lambda: check(llm, expected))  # type: ignore[arg-type]


def test_a_stream_freed_by_a_thread_does_not_wait_for_a_long_step(llm: LLM, expected: list[list[int]]) -> None:
    stream, step, freed = llm.stream([9] * 20, LONG), llm.engine.step, threading.Event()
    next(stream)

    def free() -> None:
        stream.close()  # type: ignore[attr-defined]
        freed.set()

    def long_step() -> list:
        if not freed.is_set():
            threading.Thread(target=free).start()
            assert freed.wait(10), "the finalizer waits for the step"
        return step()

    llm.engine.step = long_step  # type: ignore[method-assign]
    try:
        assert tokens(llm) == expected
    finally:
        llm.engine.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, SystemExit, RequestError])
def test_whatever_strikes_leaves_a_clean_engine(llm: LLM, expected: list[list[int]], kind: type[BaseException]) -> None:
    strike_at_lines(llm, expected, kind, 2 * EVERY)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, RequestError])
def test_whatever_strikes_at_more_lines(llm: LLM, expected: list[list[int]], kind: type[BaseException]) -> None:
    print(strike_at_lines(llm, expected, kind, EVERY // 10), "lines")


def strike_at_lines(llm: LLM, expected: list[list[int]], kind: type[BaseException], step: int) -> int:
    """Another request that runs gives all its tokens or says that it failed."""

    def strike() -> None:
        raise kind("struck")

    whole = [i for chunk in llm.stream([9] * 20, LONG) for i in chunk.token_ids]
    tried = 0
    for number in lines(llm, step):
        other = llm.stream([9] * 20, LONG)
        chunks = [next(other)]
        try:
            at_line(number, strike, lambda: check(llm, expected))
        except AssertionError:  # of `tokens`: its own text could not be made, which it was told
            assert kind in (MemoryError, RequestError)
        except kind:
            pass
        chunks += other
        if chunks[-1].finish_reason == "error":
            assert "ask again" in (chunks[-1].error or "") or "no text could be made" in (chunks[-1].error or "")
        else:
            assert [i for chunk in chunks for i in chunk.token_ids] == whole, number
        assert tokens(llm) == expected, number
        llm.engine.scheduler.check()
        assert llm.engine.scheduler.usage(0) == 0.0
        tried += 1
    return tried


def test_ctrl_c_twice_in_a_step_leaves_a_clean_engine(llm: LLM, expected: list[list[int]]) -> None:
    commit = llm.engine._commit

    def interrupted(pending: object) -> list:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return commit(pending)  # type: ignore[arg-type]

    llm.engine._commit = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            tokens(llm)
    finally:
        llm.engine._commit = commit  # type: ignore[method-assign]
    assert tokens(llm) == expected


def test_ctrl_c_in_a_step_that_fails_is_not_forgotten(llm: LLM) -> None:
    step = llm.engine.step

    def failing() -> list:
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the device is gone")

    llm.engine.step = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            tokens(llm)
    finally:
        llm.engine.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("phase", ["scheduler.schedule", "runner.submit", "runner._launch", "_commit", "runner.reset"])
def test_a_failure_of_any_phase_ends_what_runs_with_its_reason(
    llm: LLM, expected: list[list[int]], phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = llm.stream([9] * 20, LONG)
    next(other)
    *owner, name = f"engine.{phase}".split(".")
    target: object = llm
    for each in owner:
        target = getattr(target, each)

    def fail(*_: object) -> None:
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        if phase == "runner.reset":  # what cleans up fails, too
            patch.setattr(llm.engine.runner, "submit", fail)
        with pytest.raises(MemoryError, match="full"):
            tokens(llm)
    *_, last = other
    assert last.finish_reason == "error" and "ask again" in (last.error or "")
    assert tokens(llm) == expected


def test_a_text_that_cannot_be_made_ends_its_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llm.generate([9] * 20, LONG)[0].outputs[0].token_ids
    other = llm.stream([9] * 20, LONG)
    chunks = [next(other)]
    with monkeypatch.context() as patch:
        deliver = llm._session._deliver

        def failing(event: object) -> None:
            request = event.sequence.request  # type: ignore[attr-defined]
            if request.prompt == PROMPT:
                patch.setattr(llm._session._running[request.request_id], "push", lambda _: 1 // 0, raising=False)
            deliver(event)  # type: ignore[arg-type]

        patch.setattr(llm._session, "_deliver", failing)
        (failed,) = llm.generate(PROMPT, PARAMS)
    assert [output.finish_reason for output in failed.outputs] == ["error"] * 2
    assert "no text could be made of token" in (failed.outputs[0].error or "")
    assert [i for chunk in [*chunks, *other] for i in chunk.token_ids] == whole


def test_a_handler_inside_a_step_is_refused(llm: LLM, expected: list[list[int]]) -> None:
    said: list[str] = []

    def ask() -> None:
        try:
            llm.generate(PROMPT, PARAMS)
        except RequestError as error:
            said.append(str(error))

    for number in list(lines(llm, 10 * EVERY)):
        at_line(number, ask, lambda: check(llm, expected))
    assert said and all("in the middle of a step" in each for each in said)


def test_a_child_of_a_fork_says_so_at_once(llm: LLM) -> None:
    reading, writing = os.pipe()
    stream = llm.stream(PROMPT, PARAMS)
    next(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:  # nothing but what is tested may run here
        said = []
        for call in (
            lambda: llm.generate(PROMPT, PARAMS),
            lambda: list(stream),
            lambda: llm.embed(PROMPT),
            lambda: LLM(load_format="dummy"),
        ):
            try:
                call()
            except UserError as error:
                said.append("'spawn'" in str(error))
            except BaseException:
                said.append(False)
        os.write(writing, bytes(said))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = list(pipe.read())
    os.waitpid(child, 0)
    assert said == [True] * 4
    stream.close()  # type: ignore[attr-defined]


def test_a_text_may_fill_the_context_where_nothing_is_generated(llm: LLM) -> None:
    text = "".join(chr(97 + i % 26) for i in range(64))
    assert len(llm.embed(text)[0].prompt_token_ids) == 64
    assert llm.embed(text)[0].embedding != llm.embed(text[:63])[0].embedding
    full, shorter = llm.score([text[:60]] * 2, [text[60:], text[60:63]])
    assert len(full.token_logprobs) == 4
    assert full.token_logprobs[:3] == pytest.approx(shorter.token_logprobs, abs=1e-4)
    for call in (lambda: llm.embed(text + "a"), lambda: llm.score([text], ["a"])):
        with pytest.raises(RequestError, match=r"the prompt has 65 tokens, the context holds 64: shorten"):
            call()
    with pytest.raises(RequestError, match="one must be left for the output"):
        llm.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=0))
