"""`llm-infer bench serving` from settings to reports: finds the server, makes the requests, sends them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from llm_infer.base.errors import UserError
from llm_infer.bench.serving import datasets, traces
from llm_infer.bench.serving.client import Client, Target
from llm_infer.bench.serving.events import message_of
from llm_infer.bench.serving.figures import figures
from llm_infer.bench.serving.load import Load, put_load
from llm_infer.bench.serving.report import page
from llm_infer.bench.serving.requests import Conversation, Form
from llm_infer.bench.serving.response import MalformedResponse
from llm_infer.bench.serving.settings import Settings
from llm_infer.bench.serving.table import table
from llm_infer.bench.serving.vocabulary import Vocabulary


def run(settings: Settings, json_file: str | None = None, html_file: str | None = None) -> None:
    """Puts a load on a server, prints the figures and writes the reports; also of what is done when Ctrl-C ends it.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
        UserError: the server cannot be used, or no request succeeded.
    """
    _allow_connections()
    model, load = asyncio.run(measure(settings))
    found = figures(load, settings.metrics, settings.percentiles, settings.goodput)
    shown = shown_settings(settings, model)
    print(table(found, settings.metrics, settings.percentiles))
    if json_file:
        Path(json_file).write_text(json.dumps({**shown, **found}, indent=1) + "\n")
    if html_file:
        html = page(load, found, shown, settings.metrics, settings.percentiles)
        Path(html_file).write_text(html, encoding="utf-8")
    if load.interrupted:
        raise KeyboardInterrupt
    if not found["completed"]:
        first = next(each for each in found["errors"] if each)
        raise UserError(f"no request succeeded; the first ended with {first}")


def _allow_connections() -> None:
    """Raises the number of files that this process may open to its limit: each running request has a connection."""
    try:
        import resource
    except ImportError:  # Windows has no such number
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def measure(settings: Settings) -> tuple[str, Load]:
    """Returns the name of the model and what became of the load."""
    client = Client(Target(settings.base_url, settings.api_key), settings.timeout)
    try:
        model = await find_model(client, settings)
        sends_ids = not settings.chat and settings.lengths.turns == 1
        vocabulary = await Vocabulary.of_server(client, model) if sends_ids else Vocabulary(None)
        conversations = make_conversations(settings, vocabulary)
        form = Form(model, settings.chat, settings.stream, vocabulary, settings.fields)
        await _warm_up(client, settings, form, conversations[0])
        async with _progress(len(conversations)) as load:
            times = due(settings, conversations)
            await put_load(client, settings.url_path, form, conversations, times, settings.max_concurrency, load)
        return model, load
    finally:
        client.close()


async def find_model(client: Client, settings: Settings) -> str:
    """Waits until the server answers, and returns the name of the model to ask for.

    Raises:
        UserError: there is no server, it refuses the key, or has no such model.
    """
    url, end = client.target.url, time.monotonic() + settings.ready_seconds
    while True:
        try:
            path, (status, answer) = "/health", await client.fetch("GET", "/health")
            if status != 503:  # servers that have no such route are asked for their models all the same
                path, (status, answer) = "/v1/models", await client.fetch("GET", "/v1/models")
            problem = f"answers {status} to GET {path}: {message_of(answer)[:200]}" if status >= 500 else ""
        except (OSError, MalformedResponse) as error:
            status, answer = 0, None
            problem = f"cannot be asked ({error or 'no answer in 30 s'})"
        if not problem:
            break
        if time.monotonic() >= end:
            waiting = "wait longer with" if settings.ready_seconds else "wait for it with"
            raise UserError(
                f"the server at {url} {problem}. Start it or set --base-url; {waiting} --ready-check-timeout-sec N"
            )
        await asyncio.sleep(0.5)
    if status in (401, 403):
        raise UserError(f"the server at {url} refuses the key ({status}): set --api-key")
    models = answer.get("data") if status == 200 and isinstance(answer, dict) else None
    names = [each["id"] for each in models or () if isinstance(each, dict) and isinstance(each.get("id"), str)]
    if settings.model is None and not names:
        raise UserError(f"the server at {url} names no model at /v1/models (status {status}): set --model NAME")
    if settings.model is not None and names and settings.model not in names:
        raise UserError(f"--model {settings.model}: the server at {url} has {', '.join(names)}")
    return settings.model or names[0]


def make_conversations(settings: Settings, vocabulary: Vocabulary) -> list[Conversation]:
    """Returns what the settings ask to send."""
    count, seed, path = settings.num_prompts or 100, settings.seed, settings.path or ""
    turns, output = settings.lengths.turns, settings.max_output
    if settings.dataset == "random":
        return datasets.random_requests(vocabulary, count, settings.lengths, seed)
    if settings.dataset == "prefix_repetition":
        return datasets.prefix_repetition(
            vocabulary, count, settings.prefixes, settings.prefix, settings.suffix, output or 128, seed
        )
    if settings.dataset == "sharegpt":
        return datasets.sharegpt(path, count, output, turns, seed)
    if settings.dataset == "spec_bench":
        return datasets.spec_bench(path, count, output or 256, turns, seed)
    trace = traces.read_trace(path)[: settings.num_prompts]
    return traces.conversations(trace, vocabulary, seed, settings.trace_scale, settings.max_input, output)


def due(settings: Settings, conversations: list[Conversation]) -> list[float]:
    """Returns when each conversation starts: as its trace says, or by the request rate."""
    drawn = settings.arrivals.times(len(conversations), np.random.default_rng([settings.seed, 0]))
    return [time if each.at is None else each.at for each, time in zip(conversations, drawn.tolist(), strict=True)]


def shown_settings(settings: Settings, model: str) -> dict[str, Any]:
    """Returns the settings of a load as the reports show them; a key is not shown."""
    arrivals, lengths = settings.arrivals, {}
    if settings.dataset == "random":
        of = settings.lengths
        lengths = {
            "input_len": of.input,
            "output_len": of.output,
            "range_ratio": of.range_ratio,
            "prefix_len": of.prefix,
        }
    elif settings.dataset == "prefix_repetition":
        lengths = {
            "num_prefixes": settings.prefixes,
            "prefix_len": settings.prefix,
            "suffix_len": settings.suffix,
        }
    lengths = {f"{settings.dataset}_{name}": value for name, value in lengths.items()}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base_url": settings.base_url,
        "endpoint": settings.url_path,
        "backend": settings.backend,
        "model_id": model,
        "dataset_name": settings.dataset,
        "dataset_path": settings.path,
        "num_prompts": settings.num_prompts,
        **lengths,
        "max_turns": settings.lengths.turns,
        "max_input_len": settings.max_input,
        "max_output_len": settings.max_output,
        "request_rate": "inf" if arrivals.rate == float("inf") else arrivals.rate,
        "burstiness": "inf" if arrivals.burstiness == float("inf") else arrivals.burstiness,
        "ramp_up_strategy": arrivals.ramp,
        "ramp_up_start_rps": arrivals.ramp_start if arrivals.ramp else None,
        "ramp_up_end_rps": arrivals.ramp_end if arrivals.ramp else None,
        "trace_scale": settings.trace_scale,
        "max_concurrency": settings.max_concurrency,
        "stream": settings.stream,
        "seed": settings.seed,
        "goodput": settings.goodput,
        "extra_body": settings.fields,
    }


async def _warm_up(client: Client, settings: Settings, form: Form, conversation: Conversation) -> None:
    """Sends the first request some times, one after the other; an error of it will also be one of the load."""
    for _ in range(settings.warmups):
        await client.generate(settings.url_path, form.first(conversation.turns[0]))


@asynccontextmanager
async def _progress(total: int) -> AsyncIterator[Load]:
    """Shows how a load goes on standard error: on a terminal every half second in one line, elsewhere every ten seconds."""
    load, terminal = Load(), sys.stderr.isatty()

    def line() -> str:
        failed = sum(1 for outcome, _ in load.outcomes if outcome.error)
        tokens = sum(outcome.output_tokens or 0 for outcome, _ in load.outcomes)
        seconds = time.perf_counter() - load.started if load.started else 0.0
        return (
            f"{seconds:.0f} s: {len(load.outcomes)} answers of {total} conversations, {load.running} running, "
            f"{failed} failed, {tokens} tokens"
        )

    async def show() -> None:
        while True:
            await asyncio.sleep(0.5 if terminal else 10.0)
            print(
                f"\r\x1b[K{line()}" if terminal else line(), end="" if terminal else "\n", file=sys.stderr, flush=True
            )

    showing = asyncio.ensure_future(show())
    try:
        yield load
    finally:
        showing.cancel()
        print("\r\x1b[K" if terminal else "", end="", file=sys.stderr, flush=True)
