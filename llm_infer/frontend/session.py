"""Text requests over an engine that several threads share: each takes its turn at a step, which serves the requests of all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llm_infer.base.errors import RequestError
from llm_infer.base.forks import refuse_lost_child
from llm_infer.base.interrupts import uninterrupted
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.token_rules import Grammar
from llm_infer.engine.engine import Engine
from llm_infer.frontend.tracking import TrackedRequest
from llm_infer.scheduler.request import TokenEvent
from llm_infer.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt (its text, or None, and its ids) with what the engine is to know; see `Engine.add_request`."""

    prompt: object
    ids: list[int]
    params: SamplingParams
    bad_words: list[list[int]]
    grammar: Grammar | None
    pooled: bool = False
    prompt_only: bool = False


class Session:
    """The requests that run, and the turn at the engine.

    Python runs finalizers, signal handlers and callbacks between any two instructions of a thread, so also in the middle of
    its own step, and there every change would meet books that are half written. `leave` is made for them: it takes no lock
    and changes nothing, and whoever has the next turn does what it noted. All else refuses to begin inside a turn of the
    same thread.

    A turn that does not come to its end, whatever struck, leaves books and texts that are not to be trusted: all requests
    then end with an error, and the next turn finds a clean engine.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self._tokenizer = engine, tokenizer
        # Of the kind that knows its owner, so that code inside a turn of its own thread gets an answer and not a deadlock.
        self._lock = threading.RLock()
        self._halfway = False
        self._running: dict[str, TrackedRequest] = {}
        self._left: deque[TrackedRequest] = deque()

    def add(
        self, into: list[TrackedRequest], asked: Sequence[Asked], prepare: Callable[[list[TrackedRequest]], None]
    ) -> None:
        """Queues requests and puts them `into` a list, one by one: what is there must be left, whatever happens.

        Args:
            into: an empty list.
            asked: the prompts.
            prepare: called with all of them before any other step is made; it may be interrupted.

        Raises:
            RequestError: one of them is not acceptable.
        """

        problem: RequestError | None = None

        def queue() -> None:
            nonlocal problem
            for index, one in enumerate(asked):
                try:
                    request = self.engine.add_request(
                        one.ids,
                        one.params,
                        bad_words=one.bad_words,
                        grammar=one.grammar,
                        pooled=one.pooled,
                        prompt_only=one.prompt_only,
                    )
                except RequestError as error:
                    where = "" if len(asked) == 1 else f"prompt {index} (of {len(asked)}, from 0): "
                    problem = RequestError(f"{where}{error}")
                    return
                tracked = TrackedRequest(request, one.prompt, one.params, self._tokenizer)
                self._running[request.request_id] = tracked
                into.append(tracked)

        def turn() -> None:
            self._whole(queue)
            if problem is not None:
                raise problem
            prepare(into)

        self._take_turn(turn)

    def step(self) -> None:
        """One engine step; its tokens go to the requests they belong to, whoever called.

        Raises:
            BaseException: what ended the step; all requests have ended with an error.
        """
        self._take_turn(lambda: self._whole(self._step))

    def leave(self, tracked: Iterable[TrackedRequest]) -> None:
        """Notes that nobody waits for these requests any more; may be called from anywhere, at any time."""
        self._left.extend([one for one in tracked if not one.finished])

    def settle(self) -> None:
        """Ends at once what has been left, if nobody is at the engine; not for finalizers and the like."""
        if self._left and not self._owned and self._lock.acquire(blocking=False):
            try:
                self._whole(lambda: None)
            finally:
                self._lock.release()

    @property
    def _owned(self) -> bool:
        """Whether this very thread has the turn. The lock knows; a flag beside it could be left wrong by what strikes."""
        return self._lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks it

    def _take_turn(self, do: Callable[[], T]) -> T:
        refuse_lost_child()  # before the lock: its owner may be a thread that the child of a fork does not have
        if self._owned:
            raise RequestError(
                "this thread is in the middle of a step: a signal handler, finalizer or callback that runs inside it "
                "cannot use the LLM; let it note what is to be done, and do that afterwards"
            )
        with self._lock:
            return do()

    def _whole(self, change: Callable[[], None]) -> None:
        """Makes a change, after those that were noted, and gives up everything if it does not come to its end."""
        if self._halfway:
            self._give_up("the engine was interrupted: ask again")
        try:
            with uninterrupted():
                self._halfway = True
                self._end_left()
                change()
                self._halfway = False
        except BaseException as error:
            if self._halfway:  # and not after it, where a held back Ctrl-C strikes
                self._give_up(f"a step of the engine failed ({type(error).__name__}: {error!s:.200}): ask again")
            raise

    def _give_up(self, why: str) -> None:
        if self.engine.has_work:
            self.engine.start_anew(why)
        for one in list(self._running.values()):
            one.fail(why)
        self._running.clear()
        self._left.clear()
        self._halfway = False

    def _end_left(self) -> None:
        while self._left:
            one = self._left.popleft()
            if self._running.pop(one.request.request_id, None) is not None:
                self.engine.abort(one.request.request_id)

    def _step(self) -> None:
        for event in self.engine.step():
            self._deliver(event)
        unfinished = self.engine.scheduler.requests
        for name in [name for name in self._running if name not in unfinished]:
            self._running.pop(name).finished = True

    def _deliver(self, event: TokenEvent) -> None:
        name = event.sequence.request.request_id
        one = self._running.get(name)
        if one is None:
            return
        try:
            ended = one.push(event)
        except Exception as error:  # of the tokenizer: this text cannot be had, the others can
            why = f"no text could be made of token {event.token_id} ({type(error).__name__}: {error!s:.200})"
            self._running.pop(name).fail(why)
            self.engine.abort(name)
            return
        if ended:
            self.engine.finish(event.sequence, "stop")
