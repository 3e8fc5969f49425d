"""Section of the GPU run: the kernels of a decode step and of a layer's attention by the time that the profiler counts."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from llm_infer.bench.gpu.engine import make_engine
from llm_infer.bench.gpu.kernels import DECODE, SMALL, compile_layers, layers_call, make_arguments
from llm_infer.bench.gpu.section import Row, Setting
from llm_infer.decoding.sampling_params import SamplingParams

STEPS = 8
MOST = 14
"""Kernels that are named."""


def profile(setting: Setting) -> Iterator[Row]:
    """Yields the kernels with the most time per layer of attention, and per step of an engine that decodes."""
    names = ("gpu_triton",) if setting.small else ("gpu_mosaic", "gpu_triton")
    for shape in SMALL[:1] if setting.small else (DECODE[0], DECODE[2], DECODE[4]):
        for name in names:
            arguments = make_arguments(shape)
            call = layers_call(arguments, compile_layers(setting, arguments, name))
            call().block_until_ready()
            yield from _rows(f"{name}, {shape.name}, a layer", functools.partial(_repeat, call), arguments[0].shape[0])
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
            yield from _rows("a full prefill step", functools.partial(_repeat, engine.step))
        while not all(request.first_token_time for request in requests):
            engine.step()
        _repeat(engine.step)
        yield from _rows(f"a decode step of {batch}", functools.partial(_repeat, engine.step))
        for request in requests:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.step()


def _repeat(call: Callable[[], Any]) -> None:
    jax.block_until_ready([call() for _ in range(STEPS)])


def _rows(what: str, call: Callable[[], None], layers: int = 1) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        span, kernels = _device_time(Path(folder))
    times = STEPS * layers
    totals = {name: sum(each) for name, each in kernels.items()}
    yield {"what": what, "kernel": "all", "µs": sum(totals.values()) / times, "span µs": span / times}
    for name in sorted(totals, key=totals.__getitem__, reverse=True)[:MOST]:
        yield {"what": what, "kernel": name, "µs": totals[name] / times, "calls": len(kernels[name]) / times}


def _device_time(folder: Path) -> tuple[float, dict[str, list[float]]]:
    """Returns (time from the first kernel to the last, the times of the kernels by name), in µs."""
    (path,) = folder.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    if lines and not events:
        print("no stream among", [line.name for line in lines], flush=True)
    kernels: dict[str, list[float]] = {}
    for event in events:
        kernels.setdefault(re.sub(r"[_.]?\d+$", "", event.name)[:60], []).append(event.duration_ns / 1e3)
    ends, starts = (e.start_ns + e.duration_ns for e in events), (e.start_ns for e in events)
    return (max(ends, default=0.0) - min(starts, default=0.0)) / 1e3, kernels
