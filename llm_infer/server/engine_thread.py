"""The thread that owns the engine: commands go in, and after each step one message with all that is new comes out."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_infer.base.errors import ProcessLostError, RequestError, UserError
from llm_infer.base.outputs import EmbeddingOutput, RequestOutput, StreamChunk
from llm_infer.engine.warm_up import WarmUp
from llm_infer.frontend.prompts import Asked
from llm_infer.frontend.scoring import embedding_of
from llm_infer.frontend.session import MAX_TRIES, Session
from llm_infer.frontend.tracking import TrackedRequest
from llm_infer.scheduler.request import Request

STOPPING = "the server stops"
"""The error of what still runs when the server ends."""

STATS_SECONDS = 1.0
"""Seconds after which figures are delivered though nobody has news."""

MAX_FAILED_STEPS = 3
"""Steps that may fail one after the other before the engine counts as dead: each has ended the requests that ran."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of the engine: prompts that run together, and which of the answers are wanted.

    Attributes:
        number: names the job in commands and messages.
        asked: the prompts.
        stream: new text is wanted step by step, and not only at the end.
        kind: the result is a RequestOutput, or an EmbeddingOutput: the mean, of length 1.
    """

    number: int
    asked: Sequence[Asked]
    stream: bool
    kind: Literal["generate", "embed"] = "generate"


@dataclass(slots=True)
class Update:
    """News of one job; plain data.

    Attributes:
        number: the job's.
        started: its first token has been scheduled; said once.
        chunks: new text, each with the index of its prompt.
        results: one for each prompt, in the last update of a job that did not fail.
        error: why it ended otherwise.
        fault: the error is the server's, not the request's.
        first_tokens: seconds from arrival to the first token, of prompts that have just got theirs.
    """

    number: int
    started: bool = False
    chunks: list[tuple[int, StreamChunk]] = field(default_factory=list)
    results: list[RequestOutput] | list[EmbeddingOutput] | None = None
    error: str | None = None
    fault: bool = False
    first_tokens: list[float] = field(default_factory=list)

    @property
    def last(self) -> bool:
        """Whether nothing more comes of this job."""
        return self.results is not None or self.error is not None


@dataclass(slots=True)
class EngineStats:
    """Figures of the engine after a step; counts grow from its start."""

    running: int = 0
    waiting: int = 0
    page_usage: float = 0.0
    steps: int = 0
    preemptions: int = 0
    copied_pages: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    compiles: int = 0
    new_tokens: int = 0
    schedule_seconds: float = 0.0
    prepare_seconds: float = 0.0
    dispatch_seconds: float = 0.0
    device_seconds: float = 0.0
    commit_seconds: float = 0.0


@dataclass(slots=True)
class _Running:
    job: Job
    tracked: list[TrackedRequest]
    started: bool = False
    without_token: set[int] = field(default_factory=set)
    new_tokens: int = 0


Deliver = Callable[[list[Update], EngineStats], None]


class EngineThread:
    """Drives a session. All but `run` may be called from any thread; none of it waits.

    Programs that a job needs and that are not there are compiled by a thread of their own, while steps go on; the job
    waits for them, and nobody else does.

    Args:
        session: nobody else may use it.
        deliver: is called on this thread after each step that has news, with them and figures of the engine.
    """

    def __init__(self, session: Session, deliver: Deliver) -> None:
        self._session, self._deliver = session, deliver
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._compiling: dict[int, Job] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile", initializer=_give_way)
        self._updates: list[Update] = []
        self._figures_changed = False  # though nobody has news
        self._new_tokens, self._delivered = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.last_step = time.monotonic()
        self.dead: str | None = None

    def start(self) -> None:
        """Begins to take commands."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Has a job computed; its updates come by `deliver`, also where it is refused."""
        self._commands.put(lambda: self._make(job))

    def abort(self, number: int) -> None:
        """Ends a job before the next step; no update of it comes any more."""
        self._commands.put(lambda: self._abort(number))

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the step that runs."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        failed, why = 0, ""
        try:
            while self._obey(wait=not self._session.engine.has_work):
                try:
                    if self._session.engine.has_work:
                        self._session.step()
                        failed = 0
                except ProcessLostError:
                    raise
                except Exception as error:  # its requests have ended with an error; the next step finds a clean engine
                    failed, why = failed + 1, f"{type(error).__name__}: {error!s:.200}"
                self.last_step = time.monotonic()
                self._report()
                if failed >= MAX_FAILED_STEPS:
                    raise RuntimeError(f"{failed} steps failed one after the other; the last with {why}")
        except BaseException as error:
            self.dead = f"the engine has ended ({type(error).__name__}: {error!s:.300})"
            self._fail_all(self.dead)
        else:
            self._fail_all(STOPPING)

    def _obey(self, *, wait: bool) -> bool:
        """Carries out the commands that are there, or waits for one; False says that the thread is to end."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = wait and not (self._session.engine.has_work or self._updates or self._figures_changed)

    def _make(self, job: Job) -> None:
        try:
            made = self._session.make(job.asked)
        except UserError as error:
            self._refuse(job, error)
        else:
            self._queue(job, made, 1)

    def _queue(self, job: Job, made: Sequence[Request], tries: int) -> None:
        """Queues a job whose programs are there, and has them compiled where they are not."""
        tracked: list[TrackedRequest] = []
        try:
            missing = self._session.queue_if_ready(tracked, job.asked, made, anyway=tries >= MAX_TRIES)
        except UserError as error:
            self._session.leave(tracked)
            self._refuse(job, error)
            return
        if missing is None:
            self._running[job.number] = _Running(job, tracked, without_token=set(range(len(tracked))))
            return
        self._compiling[job.number] = job

        def again(error: Exception | None) -> None:
            if self._compiling.pop(job.number, None) is None:  # aborted meanwhile
                return
            if error is None:
                self._queue(job, made, tries + 1)
            else:
                why = (
                    f"a program that this request needs could not be compiled ({type(error).__name__}: {error!s:.200})"
                )
                self._updates.append(Update(job.number, error=why, fault=True))

        def compile_and_return() -> None:
            # Who has left meanwhile needs no programs, and those behind should not wait for them.
            error = self._compile(missing) if job.number in self._compiling else None
            self._commands.put(lambda: again(error))

        self._compiler.submit(compile_and_return)

    def _compile(self, programs: WarmUp) -> Exception | None:
        try:
            self._session.compile(programs, threads=1)  # the steps need the other cores
        except Exception as error:
            return error
        return None

    def _refuse(self, job: Job, error: UserError) -> None:
        self._updates.append(Update(job.number, error=str(error), fault=not isinstance(error, RequestError)))

    def _abort(self, number: int) -> None:
        self._compiling.pop(number, None)
        if (running := self._running.pop(number, None)) is not None:
            self._session.leave(running.tracked)
            self._session.settle()
            self._figures_changed = True

    def _report(self) -> None:
        """Delivers what is new since the last time."""
        updates, self._updates = self._updates, []
        for number, running in list(self._running.items()):
            update = _news(running)
            self._new_tokens += running.new_tokens
            if update is not None:
                updates.append(update)
                if update.last:
                    del self._running[number]
                    self._session.leave(running.tracked)
        now = time.monotonic()
        if updates or self._figures_changed or now - self._delivered > STATS_SECONDS:
            self._delivered = now
            self._figures_changed = self._session.engine.has_work and not self._running
            self._deliver(updates, self.stats())

    def _fail_all(self, why: str) -> None:
        numbers = [*self._running, *self._compiling]
        self._running.clear()
        self._compiling.clear()
        updates = [*self._updates, *(Update(number, error=why, fault=True) for number in numbers)]
        self._updates = []
        self._deliver(updates, self.stats())

    def stats(self) -> EngineStats:
        """Returns figures of the engine."""
        engine = self._session.engine
        scheduler, times, runner = engine.scheduler, engine.times, engine.runner.times
        cache = scheduler.prefix_cache
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            page_usage=scheduler.usage(),
            steps=times.steps,
            preemptions=scheduler.num_preemptions,
            copied_pages=scheduler.num_copied_pages,
            prefix_queries=0 if cache is None else cache.num_queries,
            prefix_hits=0 if cache is None else cache.num_hits,
            compiles=runner.compiles,
            new_tokens=self._new_tokens,
            schedule_seconds=times.schedule,
            prepare_seconds=runner.prepare,
            dispatch_seconds=runner.dispatch,
            device_seconds=times.device,
            commit_seconds=times.commit,
        )


def _give_way() -> None:
    """Lowers the priority of this thread, and of those that it starts, where each has one of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)


def _news(running: _Running) -> Update | None:
    """Returns what happened to a job since the last time; None if nothing did that anybody waits for."""
    job = running.job
    update = Update(job.number)
    if not running.started and any(one.request.first_scheduled_time is not None for one in running.tracked):
        running.started = update.started = True
    done = all(one.finished for one in running.tracked)
    running.new_tokens = 0
    for index, one in enumerate(running.tracked):
        running.new_tokens += sum(len(chunk.token_ids) for chunk in one.chunks)
        if index in running.without_token and one.request.first_token_time is not None and job.kind == "generate":
            running.without_token.discard(index)
            update.first_tokens.append(one.request.first_token_time - (one.request.arrival_time or 0.0))
        if job.stream:
            update.chunks += [(index, chunk) for chunk in one.chunks]
            if done:
                update.chunks += [(index, chunk) for chunk in one.ended_without_token()]
        one.chunks.clear()
    if done:
        failures = [one.failure for one in running.tracked if one.failure is not None]
        if failures:
            update.error, update.fault = failures[0], True
        else:
            try:
                update.results = _results(job, running.tracked)
            except UserError as error:
                update.error, update.fault = str(error), False
    return update if update.started or update.chunks or update.first_tokens or update.last else None


def _results(job: Job, tracked: list[TrackedRequest]) -> Any:
    if job.kind == "embed":
        return [embedding_of(one, "mean", True) for one in tracked]
    return [one.result() for one in tracked]
