"""What all routes share: the state of the server, who may still come in, and the way to the engine and back."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, TypeVar

from llm_infer.base.errors import UserError
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.frontend.prompts import Asked, PromptReader
from llm_infer.frontend.session import Session
from llm_infer.options import EngineOptions
from llm_infer.server.answers import Formats
from llm_infer.server.engine_thread import EngineStats, EngineThread, Job, Update
from llm_infer.server.errors import ApiError, bad_request
from llm_infer.server.metrics import Metrics
from llm_infer.server.options import ServerOptions, shown_name
from llm_infer.server.tracing import Tracing
from llm_infer.starting import start
from llm_infer.text.tokenizer import Tokenizer

T = TypeVar("T")

LOGPROBS = StepFeatures.LOGPROBS | StepFeatures.TOP_LOGPROBS
GENERATION = LOGPROBS | StepFeatures.PENALTIES | StepFeatures.MASKED
"""What rows of a generation may need: with these programs and the plain ones no such request waits for a compiler."""

EVERYTHING = GENERATION | StepFeatures.PROMPT_LOGPROBS | StepFeatures.POOLED | StepFeatures.BEAMS
SCORING = LOGPROBS | StepFeatures.PROMPT_LOGPROBS

LEVELS = (PLAIN, GENERATION, StepFeatures.POOLED, StepFeatures.BEAMS, SCORING, EVERYTHING)
"""Programs that there may be of each size: with one for each mixture of requests, some client would always wait."""

WORKERS = 2
"""Threads that read prompts: tokenizers, templates and grammars compute outside Python's lock."""

State = Literal["loading", "compiling", "ready", "draining", "dead"]


class Ticket:
    """A job's news for the coroutine that waits for them.

    Attributes:
        prompt_tokens: tokens of all its prompts.
        started: its first token has been scheduled.
        last_news: when somebody was last told something, in seconds of the monotonic clock.
    """

    def __init__(self, number: int, asked: Sequence[Asked]) -> None:
        self.number = number
        self.prompt_tokens = sum(len(one.ids) for one in asked)
        self.num_requests = len(asked)
        self.started = False
        self.last_news = time.monotonic()
        self._updates: deque[Update] = deque()
        self._news = asyncio.Event()

    def take(self, update: Update) -> None:
        """Adds an update and wakes who waits."""
        self._updates.append(update)
        self._news.set()

    def nudge(self) -> None:
        """Has who waits go on without news."""
        self._news.set()

    async def news(self) -> list[Update]:
        """Returns all updates that are there; waits for one if there is none, and returns none after a nudge."""
        if not self._updates:
            self._news.clear()
            await self._news.wait()
        self.last_news = time.monotonic()
        found = list(self._updates)
        self._updates.clear()
        return found


class Service:
    """A model that is loaded by a thread of its own, and then answers; made and used on the event loop's thread.

    Args:
        engine_options, options: the settings.
        prepare: makes the session; by default from the engine's options.

    Attributes:
        formats: how the model writes calls and reasoning.
        state: "loading" and "compiling" come before "ready"; "draining" and "dead" after it.
        failure, error: why it is dead.
        done, total: programs that were compiled before it is ready, and how many there are.
        stats: figures of the engine after its last step with news.
    """

    def __init__(
        self,
        engine_options: EngineOptions,
        options: ServerOptions,
        *,
        prepare: Callable[[EngineOptions], tuple[Tokenizer, Session]] | None = None,
    ) -> None:
        self.options = options
        self.engine_options = engine_options
        self.state: State = "loading"
        self.failure: str | None = None
        self.error: BaseException | None = None
        self.formats = Formats(None, options.tool_call_parser, options.reasoning_parser)
        self.done = self.total = 0
        self.created = int(time.time())
        self.names = options.served_model_names or (shown_name(engine_options.model),)
        self.metrics = Metrics(options.metrics_prefix, self.names[0])
        self.tracing = Tracing(options.otlp_traces_endpoint)
        self.stats = EngineStats()
        self.num_active = 0
        self.ended: asyncio.Event = asyncio.Event()
        self.tokenizer: Tokenizer
        self.session: Session
        self.engine: EngineThread
        self._prepare = prepare or _prepared
        self._loader = threading.Thread(target=self._load, name="load", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[int, Ticket] = {}
        self._numbers = itertools.count()
        self._queued_requests = self._queued_tokens = 0
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="prompts")

    # Its life.

    def begin(self) -> None:
        """Starts to load the model; `state` says how far it is."""
        self._loader.start()

    @property
    def is_loading(self) -> bool:
        """Whether the thread that loads and compiles has not ended."""
        return self._loader.is_alive()

    def _load(self) -> None:
        try:
            self.tokenizer, self.session = self._prepare(self.engine_options)
            template = self.options.chat_template or self.tokenizer.chat_templates.get(
                "tool_use", self.tokenizer.chat_template
            )
            self.formats = Formats(template, self.options.tool_call_parser, self.options.reasoning_parser)
            self.session.engine.levels = LEVELS
            self._tell(self._set_state, "compiling")
            self._warm_up()
            with suppress(UserError):  # without the library for them requests with grammars are refused
                self.session.prompts.grammars()
            self.engine = EngineThread(self.session, self._deliver)
            self._tell(self._take, [], self.engine.stats())
            self.engine.start()
            self._tell(self._set_state, "ready")
        except BaseException as error:
            self._tell(self._fail, error)

    def _warm_up(self) -> None:
        features = {"none": [], "generation": [PLAIN, GENERATION], "all": [PLAIN, GENERATION, EVERYTHING]}
        wanted = features[self.options.warm_up]
        if not wanted:
            return
        programs = self.session.engine.warm_up(None, wanted)
        self.total = len(programs)

        def count(_: int) -> None:
            self.done += 1

        self.session.compile(programs, count)

    def _tell(self, what: Callable[..., object], *args: object) -> None:
        """Calls something on the event loop's thread; a loop that is closed does not listen any more."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *args)

    def _set_state(self, state: State) -> None:
        if self.state not in ("draining", "dead"):
            self.state = state

    def _fail(self, error: BaseException) -> None:
        self.state, self.failure = "dead", f"{error}"
        self.error = error
        self.ended.set()

    def drain(self) -> None:
        """Lets no new request in; those that run go on."""
        if self.state != "dead":
            self.state = "draining"

    async def close(self) -> None:
        """Ends what still runs."""
        if hasattr(self, "engine"):
            await asyncio.get_running_loop().run_in_executor(None, self.engine.stop, 10.0)
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.tracing.close()

    def require_ready(self) -> None:
        """Raises ApiError unless requests are taken."""
        words = {
            "loading": "the model is being loaded: ask again in a moment",
            "compiling": f"programs are being compiled ({self.done} of {self.total}): ask again in a moment",
            "draining": "the server is about to stop and takes no new requests",
            "dead": "the engine has ended: the server must be started again",
        }
        if self.state != "ready":
            retry = {} if self.state == "dead" else {"retry-after": "5"}
            raise ApiError(503, words[self.state], code=self.state, headers=retry)

    # Requests.

    async def in_worker(self, work: Callable[..., T], *args: Any) -> T:
        """Runs something that computes for long, such as a tokenizer, on another thread.

        Raises:
            ApiError: it raised UserError: the request cannot be done.
        """
        try:
            return await self._loop.run_in_executor(self._workers, work, *args)
        except UserError as error:
            raise bad_request(str(error)) from None

    @property
    def prompts(self) -> PromptReader:
        """Reads prompts; for worker threads."""
        return self.session.prompts

    def admit(self, num_requests: int, num_tokens: int = 0) -> None:
        """Raises ApiError if so many more requests, or tokens of prompts, may not wait; into an empty queue any may come."""
        options, waiting = self.options, self._queued_requests + num_requests
        if waiting > options.max_num_queued_requests and self._queued_requests:
            reason, what = "requests", f"{options.max_num_queued_requests} requests"
        elif self._queued_tokens + num_tokens > options.max_num_queued_tokens and self._queued_tokens:
            reason, what = "tokens", f"{options.max_num_queued_tokens} tokens of prompts"
        else:
            return
        self.metrics.rejected(reason)
        seconds = str(self.retry_after())
        raise ApiError(
            options.overload_status,
            f"too much is waiting (at most {what}): ask again in {seconds} s",
            code="overloaded",
            headers={"retry-after": seconds},
        )

    def retry_after(self) -> int:
        """Returns after how many seconds it is worth asking again, 1 to 120."""
        rate = self.metrics.prompt_rate()
        return min(120, max(1, round(self._queued_tokens / rate))) if rate else 1

    @asynccontextmanager
    async def running(
        self,
        asked: Sequence[Asked],
        *,
        stream: bool,
        kind: Literal["generate", "embed"] = "generate",
    ) -> AsyncIterator[Ticket]:
        """Has prompts computed; on leaving the `with` block what has not ended is aborted.

        Raises:
            ApiError: the server is not ready, or too much waits already.
        """
        self.require_ready()
        ticket = Ticket(next(self._numbers), asked)
        self.admit(ticket.num_requests, ticket.prompt_tokens)
        self._queued_requests += ticket.num_requests
        self._queued_tokens += ticket.prompt_tokens
        self._tickets[ticket.number] = ticket
        self.engine.submit(Job(ticket.number, asked, stream, kind))
        try:
            yield ticket
        finally:
            if self._tickets.pop(ticket.number, None) is not None:
                self._leave_queue(ticket)
                self.engine.abort(ticket.number)
                self.metrics.finished("abort", ticket.num_requests)

    def _leave_queue(self, ticket: Ticket) -> None:
        if not ticket.started:
            ticket.started = True
            self._queued_requests -= ticket.num_requests
            self._queued_tokens -= ticket.prompt_tokens

    def _deliver(self, updates: list[Update], stats: EngineStats) -> None:
        self._tell(self._take, updates, stats)

    def _take(self, updates: list[Update], stats: EngineStats) -> None:
        self.stats = stats
        for update in updates:
            if (ticket := self._tickets.get(update.number)) is None:
                continue
            if update.started or update.last:
                self._leave_queue(ticket)
            if update.last:
                del self._tickets[update.number]
            self.metrics.observe(update)
            ticket.take(update)
        if self.engine.dead is not None and self.state != "dead":
            self.state, self.failure = "dead", self.engine.dead
            self.ended.set()


def _prepared(options: EngineOptions) -> tuple[Tokenizer, Session]:
    tokenizer, engine, progress = start(options)
    return tokenizer, Session(engine, tokenizer, progress)
