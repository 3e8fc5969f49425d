"""Section of the GPU run: the kernels of a decode step and of a layer's attention by the time that the profiler counts."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from llm_infer.bench.gpu.engine import make_engine
from llm_infer.bench.gpu.kernels import DECODE, SMALL, compile_layers, make_arguments
from llm_infer.bench.gpu.section import Row, Setting
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine

STEPS = 8
MOST = 14
"""Kernels that are named."""


def profile(setting: Setting) -> Iterator[Row]:
    """Yields the kernels with the most time per layer of attention, and per step of an engine that decodes."""
    names = ("gpu_triton",) if setting.small else ("gpu_mosaic", "gpu_triton")
    for shape in SMALL[:1] if setting.small else (DECODE[0], DECODE[2], DECODE[4]):
        for name in names:
            arguments = make_arguments(shape)
            program = compile_layers(setting, arguments, name)
            pages, *others = arguments
            held = [program(pages, *others)[1]]

            def call(held=held, others=others, program=program):
                for _ in range(STEPS):
                    held[0] = program(held[0], *others)[1]
                held[0].block_until_ready()

            yield from _rows(f"{name}, {shape.name}, a layer", call, STEPS * held[0].shape[0])
    engine, batches, prompt, *_ = make_engine(setting)
    for batch in batches:
        if setting.seconds_left <= 0:
            return
        requests = [
            engine.add_request(
                list(range(10, 10 + prompt)), SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
            )
            for _ in range(batch)
        ]
        if batch == batches[-1]:
            yield from _rows("a full prefill step", functools.partial(_steps, engine, STEPS), STEPS)
        while not all(request.first_token_time for request in requests):
            engine.step()
        _steps(engine, STEPS)
        yield from _rows(f"a decode step of {batch}", functools.partial(_steps, engine, STEPS), STEPS)
        for request in requests:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.step()


def _steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def _rows(what: str, call: Callable[[], None], times: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        busy, span, kernels = _device_time(Path(folder))
    yield {"what": what, "kernel": "all", "µs": busy / times, "span µs": span / times}
    for (name, count), total in kernels.most_common(MOST):
        yield {"what": what, "kernel": name, "µs": total / times, "calls": count / times}


def _device_time(folder: Path) -> tuple[float, float, Counter[tuple[str, float]]]:
    """Returns (time in kernels, time from the first to the last, time by name and number of calls), in µs."""
    (path,) = folder.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    if lines and not events:
        print("no stream among", [line.name for line in lines], flush=True)
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        name = re.sub(r"[_.]?\d+$", "", event.name)[:60]
        times[name] += event.duration_ns / 1e3  # type: ignore[assignment]
        counts[name] += 1
    span = 0.0
    if events:
        span = max(e.start_ns + e.duration_ns for e in events) - min(e.start_ns for e in events)
    by_kernel: Counter[Any] = Counter({(name, counts[name]): time for name, time in times.items()})
    return float(sum(times.values())), span / 1e3, by_kernel
