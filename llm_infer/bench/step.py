"""`llm-infer bench step`: shows by JAX's profiler where a decode step's time goes: each native kernel, the rest, the host."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from llm_infer.base.errors import UserError
from llm_infer.bench.offline import measure
from llm_infer.bench.roof import read_bandwidth
from llm_infer.llm import LLM
from llm_infer.planner.hlo import array_bytes

PROMPT_TOKENS, NEW_TOKENS = 128, 48
REST = "XLA: all else"
_CONTAINERS = ("while", "conditional", "call")  # their time is that of their contents
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?\b([a-z][a-z0-9-]*)\(", re.MULTILINE)
_STACK = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+\[(\d+),\d+,\d+\])", re.MULTILINE)
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


def run(model: str, batch: int, precision: str, json_file: str | None) -> None:
    """Profiles decode steps of one batch size and prints milliseconds per step and shares."""
    if jax.default_backend() != "cpu":
        raise UserError("bench step reads the CPU's profile: set JAX_PLATFORMS=cpu")
    longest = PROMPT_TOKENS + NEW_TOKENS + 1
    llm = LLM(model, precision=precision, max_model_len=longest, max_num_seqs=batch, enable_prefix_caching=False)
    engine, rng = llm.engine, np.random.default_rng(0)
    list(engine.warm_up([batch, PROMPT_TOKENS * batch]))
    measure(engine, rng, batch, PROMPT_TOKENS, NEW_TOKENS)
    hlo = engine.runner.program(engine.runner.bucket_of(batch)).run.as_text()
    assert hlo is not None, "XLA's CPU backend gives the text of its programs"
    parts = parts_of(hlo)
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        measured = measure(engine, rng, batch, PROMPT_TOKENS, NEW_TOKENS)
        jax.profiler.stop_trace()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        events = _durations(trace)
    milliseconds = spent(parts, events)
    host = {name: measured[f"{name}_ms_per_step"] for name in ("schedule", "prepare", "dispatch", "commit")}
    step = 1e3 * measured["tpot_s"]
    rates = {name: read / milliseconds[name] / 1e6 for name, read in bytes_read(hlo, parts, events).items()}
    limit = read_bandwidth()
    print(table(step, milliseconds, host, rates, limit))
    if json_file:
        record = {"model": model, "batch": batch, "precision": precision, "step_ms": step, "parts_ms": milliseconds}
        record |= {"host_ms": host, "parts_gb_s": rates, "read_gb_s": limit}
        Path(json_file).write_text(json.dumps(record, indent=2) + "\n")


def parts_of(hlo: str) -> dict[str, str]:
    """Returns instruction → native kernel that it calls, or REST, for all instructions of a compiled program that take time."""
    parts = {}
    for found in _INSTRUCTION.finditer(hlo):
        name, opcode = found.groups()
        if opcode in _CONTAINERS:
            continue
        target = _TARGET.search(hlo, found.end(), hlo.find("\n", found.end())) if opcode == "custom-call" else None
        parts[name] = target[1].removeprefix("llm_infer.") if target else REST
    return parts


def _durations(trace: Path) -> dict[str, list[float]]:
    """Returns the milliseconds of every event, by name."""
    durations: dict[str, list[float]] = defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                durations[event.name].append(event.duration_ns / 1e6)
    return durations


def spent(parts: dict[str, str], events: dict[str, list[float]]) -> dict[str, float]:
    """Returns the milliseconds per step of each part: the median of each instruction times its calls per step.

    Prompts are computed by other programs, whose instructions may have the same names: a decode step's calls are
    taken to be most of those of a name, hence the median.
    """
    totals: dict[str, float] = defaultdict(float)
    for name, part in parts.items():
        if durations := events.get(name):
            totals[part] += statistics.median(durations) * _calls(durations)
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def bytes_read(hlo: str, parts: dict[str, str], events: dict[str, list[float]]) -> dict[str, float]:
    """Returns the bytes of weights that each product with stored weights reads per step: a layer's matrix in each call."""
    matrices = {name: array_bytes(shape) / int(layers) for name, shape, layers in _STACK.findall(hlo)}
    totals: dict[str, float] = defaultdict(float)
    for found in _INSTRUCTION.finditer(hlo):
        name, part = found[1], parts.get(found[1], REST)
        if not part.startswith("quant_matmul") or not (durations := events.get(name)):
            continue
        weights = re.findall(r"%([\w.-]+)", hlo[found.end() : hlo.find(")", found.end())])[1]
        totals[part] += matrices[weights] * _calls(durations)
    return dict(totals)


def _calls(durations: list[float]) -> int:
    return max(1, round(len(durations) / NEW_TOKENS))


def table(
    step: float, parts: dict[str, float], host: dict[str, float], rates: dict[str, float], limit: float | None
) -> str:
    """Returns the figures as text; what is neither a matrix product nor attention is the step without the native kernels.

    Args:
        rates: GB/s at which products read their weights; `limit` is that at which memory can be read.
    """
    kernels = sum(value for name, value in parts.items() if name != REST and not name.startswith("copy_pages"))
    lines = [f"{'step':<44}{step:>9.3f} ms"]
    for name, value in parts.items():
        lines.append(f"  {name:<42}{value:>9.3f} ms{value / step:>8.1%}")
        if name in rates:
            of_limit = "" if limit is None else f", {rates[name] / limit:.0%} of what memory gives"
            lines[-1] += f"  {rates[name]:.1f} GB/s of weights{of_limit}"
    if limit is not None:
        lines.append(f"reading memory, this run: {limit:.1f} GB/s")
    lines.append(f"{'neither matrix product nor attention':<44}{step - kernels:>9.3f} ms{1 - kernels / step:>8.1%}")
    lines.append("host, beside the device: " + ", ".join(f"{name} {value:.3f} ms" for name, value in host.items()))
    return "\n".join(lines)
