"""Text requests over an engine that several threads share: each takes its turn at a step, which serves the requests of all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from llm_infer.base.errors import RequestError
from llm_infer.base.forks import refuse_lost_child
from llm_infer.base.interrupts import uninterrupted
from llm_infer.base.plain_values import plain_list
from llm_infer.base.progress import Progress
from llm_infer.decoding.features import PLAIN, features_of, union
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.warm_up import WarmUp
from llm_infer.frontend.prompts import Asked, Prompt, PromptReader
from llm_infer.frontend.tracking import TrackedRequest
from llm_infer.models.load import LoadedModel
from llm_infer.scheduler.request import Request, TokenEvent
from llm_infer.text.tokenizer import Tokenizer

T = TypeVar("T")

MAX_TRIES = 4
"""How often a request looks again for programs that others have made it need, before it is queued all the same."""


class Session:
    """The requests that run, and the turn at the engine: what is under every front.

    A front submits requests and calls `step` until those that it waits for have finished; whoever steps serves all. What a
    request needs is compiled by the thread that submits it, without the turn, so the others go on meanwhile.

    Python runs finalizers, signal handlers and callbacks between any two instructions of a thread, so also in the middle of
    its own step, and there every change would meet books that are half written. `leave` is made for them: it takes no lock
    and changes nothing, and whoever has the next turn does what it noted. All else refuses to begin inside a turn of the
    same thread.

    A turn that does not come to its end, whatever struck, leaves books and texts that are not to be trusted: all requests
    then end with an error, and the next turn finds a clean engine.

    Args:
        engine, tokenizer: those of one model.
        progress: where compiling is reported.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, progress: Progress) -> None:
        self.engine, self._tokenizer, self._progress = engine, tokenizer, progress
        by_priority = engine.config.scheduler.policy == "priority"
        self.prompts = PromptReader(tokenizer, engine.vocab_size, by_priority=by_priority)
        # Of the kind that knows its owner, so that code inside a turn of its own thread gets an answer and not a deadlock.
        self._lock = threading.RLock()
        self._compiling = threading.RLock()
        self._halfway = self._closed = False
        self._running: dict[str, TrackedRequest] = {}
        self._left: deque[TrackedRequest] = deque()

    def submit(
        self, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str | None = None
    ) -> TrackedRequest:
        """Queues a request, which `step` then computes.

        Raises:
            RequestError: it is not acceptable, or the session is closed.
        """
        tracked: list[TrackedRequest] = []
        try:
            self._add(tracked, self.prompts.read([prompt], [params], priority=priority, cache_salt=cache_salt))
            return tracked[0]
        except BaseException:  # nobody would hear of it
            self.leave(tracked)
            raise

    @contextmanager
    def submitted(self, asked: Sequence[Asked]) -> Iterator[list[TrackedRequest]]:
        """Queues requests, all or none; those that have not finished on leaving the `with` block are left.

        Raises:
            RequestError: as `submit`.
        """
        tracked: list[TrackedRequest] = []
        try:
            self._add(tracked, asked)
            yield tracked
        finally:  # of a stream that nobody reads any more Python runs this wherever it likes
            self.leave(tracked)

    def run(self, asked: Sequence[Asked], progress: Progress) -> list[TrackedRequest]:
        """Computes requests to their end and returns them.

        Raises:
            BaseException: what struck; none of them runs then.
        """
        try:
            with self.submitted(asked) as tracked, progress.task("Generating", total=len(asked)) as bar:
                while (done := sum(one.finished for one in tracked)) < len(tracked):
                    bar.set(done)
                    self.step()
                bar.set(done)
                return tracked
        finally:
            self.settle()

    def warm_up(self, token_counts: Sequence[int] | None, params: Sequence[SamplingParams]) -> None:
        """Compiles the programs of steps of these token counts, or of all, for requests with these parameters side by side.

        Raises:
            RequestError: the counts are none.
        """
        counts = plain_list(token_counts)
        if counts is not None and not (
            isinstance(counts, list | tuple) and all(type(each) is int and each > 0 for each in counts)
        ):
            raise RequestError(f"token_counts={token_counts!r:.60}: expected whole numbers above 0, or None for all")
        self.compile(self.engine.warm_up(counts, [PLAIN, union(map(features_of, params))]))

    def compile(
        self, programs: WarmUp, compiled: Callable[[int], None] = lambda bucket: None, *, threads: int | None = None
    ) -> None:
        """Compiles step programs, side by side, and with a word about it; steps go on meanwhile.

        Threads that need the same programs at once wait for the first: then all are there.

        Args:
            programs: those.
            compiled: is told the token bucket of each when it is there.
            threads: that compile; by default as many as there are cores.
        """
        with self._compiling, self._progress.task(f"Compiling {programs}", total=len(programs)) as bar:
            for bucket in programs if threads is None else programs.compiled(threads):
                bar.advance(1)
                compiled(bucket)

    def abort(self, tracked: TrackedRequest) -> None:
        """Ends a request, at once if nobody is at the engine, else before the next step; not for finalizers and the like."""
        self.leave([tracked])
        self.settle()

    def set_weights(
        self, model: LoadedModel, version: str | None, running: str, draft: LoadedModel | None = None
    ) -> None:
        """Goes on with the weights of `model`, see `Engine.set_weights`; `running` as for `quietly`."""
        self.quietly(lambda: self.engine.set_weights(model, version, draft), running)

    def quietly(self, change: Callable[[], None], running: str) -> None:
        """Changes the engine between two steps.

        Args:
            change: what is to be done.
            running: what becomes of requests that run: "wait" computes them to their end first, and others wait meanwhile;
                "abort" ends them; "keep" has them go on with the new weights.
        """

        def between() -> None:
            if running == "abort":
                self._left.extend(self._running.values())
                self._settle_first()
            while running != "keep" and self.engine.has_work:
                self._whole(self._step)
            self._whole(change)

        self._take_turn(between)

    def close(self) -> None:
        """Ends all requests; no other can be submitted any more."""

        def end() -> None:
            self._closed = True
            self._left.extend(self._running.values())
            self._end_left()

        self._take_turn(lambda: self._whole(end))

    def _add(self, into: list[TrackedRequest], asked: Sequence[Asked]) -> None:
        """Puts requests that are queued `into` an empty list, one by one: what is there must be left, whatever happens."""
        made = self.make(asked)
        for number in range(MAX_TRIES):
            if (missing := self.queue_if_ready(into, asked, made, anyway=number == MAX_TRIES - 1)) is None:
                return
            self.compile(missing)

    def make(self, asked: Sequence[Asked]) -> list[Request]:
        """Makes requests for `queue_if_ready`: the first half of `submit`, for who must not wait for compiling.

        Raises:
            RequestError: one is not acceptable, or the session is closed.
        """
        return self._take_turn(lambda: self._make(asked))

    def queue_if_ready(
        self, into: list[TrackedRequest], asked: Sequence[Asked], made: Sequence[Request], *, anyway: bool = False
    ) -> WarmUp | None:
        """Queues requests that `make` has made, all or none, and puts them `into` a list: what is there must be left.

        Returns:
            The programs that are still missing for them beside the requests that run now; None if they are queued.
        """
        return self._take_turn(partial(self._queue_if_ready, into, asked, made, anyway))

    def _make(self, asked: Sequence[Asked]) -> list[Request]:
        """Makes requests that no books hold yet."""
        self._settle_first()
        made = []
        for index, one in enumerate(asked):
            try:
                request = self.engine.add_request(
                    one.ids,
                    one.params,
                    priority=one.priority,
                    cache_salt=one.cache_salt,
                    bad_words=one.bad_words,
                    grammar=one.grammar,
                    pooled=one.pooled,
                    prompt_only=one.prompt_only,
                    queue=False,
                )
            except RequestError as error:
                where = "" if len(asked) == 1 else f"prompt {index} (of {len(asked)}, from 0): "
                raise RequestError(f"{where}{error}") from error
            made.append(request)
        return made

    def _queue_if_ready(
        self, into: list[TrackedRequest], asked: Sequence[Asked], made: Sequence[Request], anyway: bool
    ) -> WarmUp | None:
        """Returns the programs that are still missing for requests beside those that run now; None if these are queued."""
        self._settle_first()
        programs = self.engine.warm_up_for(made)
        if len(programs) and not anyway:
            return programs

        def queue() -> None:
            for one, request in zip(asked, made, strict=True):
                self.engine.queue(request)
                tracked = TrackedRequest(request, one.text, one.params, self._tokenizer)
                self._running[request.request_id] = tracked
                into.append(tracked)

        self._whole(queue)
        return None

    def _settle_first(self) -> None:
        self._whole(lambda: None)
        if self._closed:
            raise RequestError("this session is closed, so nothing runs any more: make another one")

    def step(self) -> None:
        """Makes one engine step; its tokens go to the requests they belong to, whoever called.

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
                one.finished = True  # where another thread waits for it

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
