"""Sends conversations when they are due and waits for their answers: arrivals by rate, by a trace, or all at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llm_infer.bench.serving.client import Client, Outcome
from llm_infer.bench.serving.requests import Conversation, Form


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come.

    Attributes:
        rate: requests per second on average; infinite for all at once.
        burstiness: shape of the gamma distribution of the gaps: 1 makes arrivals a Poisson process, less makes them burstier, and
            infinity makes all gaps the same.
        ramp: "linear" or "exponential" growth of the rate from `ramp_start` at the first to `ramp_end` at the last, or None.
    """

    rate: float = float("inf")
    burstiness: float = 1.0
    ramp: str | None = None
    ramp_start: float = 0.0
    ramp_end: float = 0.0

    def times(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Returns when each of so many requests comes, in seconds after the first."""
        share = np.arange(count) / max(1, count)
        if self.ramp == "linear":
            rates = self.ramp_start + (self.ramp_end - self.ramp_start) * share
        elif self.ramp == "exponential":
            rates = self.ramp_start * (self.ramp_end / self.ramp_start) ** share
        else:
            rates = np.full(count, self.rate)
        even = np.isinf(self.burstiness)
        gaps = (np.ones(count) if even else rng.gamma(self.burstiness, 1 / self.burstiness, count)) / rates
        return np.cumsum(gaps) - gaps[:1]


@dataclass
class Load:
    """What a load has done so far; complete also where it was interrupted.

    Attributes:
        started, ended: by `time.perf_counter`.
        outcomes: of requests that have ended, in this order, each with the prompt's length that was planned.
        running: requests that are being answered.
        interrupted: whether it was ended early; requests that ran then are in no figure.
        cpu: seconds of CPU time that this client's thread took.
    """

    started: float = 0.0
    ended: float = 0.0
    outcomes: list[tuple[Outcome, int | None]] = field(default_factory=list)
    running: int = 0
    interrupted: bool = False
    cpu: float = 0.0


async def put_load(
    client: Client,
    path: str,
    form: Form,
    conversations: Sequence[Conversation],
    times: Sequence[float],
    max_concurrency: int | None,
    load: Load,
) -> None:
    """Sends all conversations and notes what becomes of them. Cancelling ends it early, which is noted, too.

    Args:
        client: to send them with.
        path: the endpoint.
        form: of the requests.
        conversations: to send.
        times: when each is due, in seconds after the start.
        max_concurrency: most conversations at once; later ones wait, which is not part of their latency.
        load: to note it in; it can be looked at meanwhile.
    """
    bodies = [form.first(each.turns[0]) for each in conversations]
    gate = asyncio.Semaphore(max_concurrency or len(conversations) or 1)

    async def talk(conversation: Conversation, body: bytes) -> None:
        said: list[tuple[str, str]] = []
        turns = conversation.turns
        for index, turn in enumerate(turns):
            more = index + 1 < len(turns)
            load.running += 1
            try:
                outcome = await client.generate(path, body, keep_text=more)
            finally:
                load.running -= 1
            load.outcomes.append((outcome, turn.input_tokens if index == 0 else None))
            if outcome.error:
                return
            if more:
                said.append((form.question(turn), outcome.text))
                body = form.next(turns[index + 1], said)

    async def start(index: int) -> None:
        try:
            await talk(conversations[index], bodies[index])
        finally:
            gate.release()

    order = sorted(range(len(conversations)), key=lambda index: times[index])
    cpu, load.started = time.thread_time(), time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for index in order:
                wait = load.started + times[index] - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                await gate.acquire()
                group.create_task(start(index))
    except asyncio.CancelledError:
        load.interrupted = True
    load.ended, load.cpu = time.perf_counter(), time.thread_time() - cpu
