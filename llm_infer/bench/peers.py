"""`llm-infer bench peers`: measures this engine, in both precisions, and other engines on the same GGUF file, in turn."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Progress
from llm_infer.weights.sources import resolve

METRICS = ("decode_b1", "decode_b8", "decode_b32", "prefill_512")
PROGRAMS = {"llama.cpp": "llama_cpp_cpu", "transformers": "transformers_bf16", "openvino": "openvino_genai_cpu"}
OURS = {"ours exact": "exact", "ours fast": "fast"}

Samples = dict[str, dict[str, list[float]]]
"""engine → metric → a value (tok/s) for each round."""


def run(model: str, pythons: Mapping[str, str | None], rounds: int, threads: int | None, json_file: str | None) -> None:
    """Measures every engine once per round, in turn, so that a drift of the machine hits them alike; prints medians.

    Each engine's figures are printed as they come. One that fails is left out of later rounds; its figures so far count.

    Raises:
        UserError: no engine could be measured.
    """
    path = resolve(model).path
    if path.suffix != ".gguf":
        raise UserError(f"{path} is not a GGUF file: all peers read GGUF, choose such a --model")
    threads = threads or len(os.sched_getaffinity(0))
    folder = Path(__file__).parent / "peer_programs"
    commands = {
        name: [sys.executable, "-m", "llm_infer.bench.peer_ours", str(path), str(threads), precision]
        for name, precision in OURS.items()
    }
    for name, python in pythons.items():
        if python is not None:
            commands[name] = [python, str(folder / f"{PROGRAMS[name]}.py"), str(path), str(threads)]
    samples: Samples = {name: {metric: [] for metric in METRICS} for name in commands}
    versions: dict[str, str] = {}
    errors: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for name, command in commands.items():
            if name in errors:
                continue
            with Progress().task(f"Measuring {name}, round {number} of {rounds}"):
                found, error = measure(command)
            for metric, value, version in found:
                samples[name][metric].append(value)
                versions[name] = version
            shown = ", ".join(f"{metric} {value:.1f}" for metric, value, _ in found) or "nothing"
            print(f"round {number}, {name}: {shown}", flush=True)
            if error is not None:
                errors[name] = error
                print(f"{name} is left out from here on: {error}", flush=True)
    print(table(samples, versions, errors))
    if json_file:
        record = {"model": path.name, "threads": threads, "versions": versions, "tok_s": samples, "errors": errors}
        Path(json_file).write_text(json.dumps(record, indent=2) + "\n")
    if not any(values for by_metric in samples.values() for values in by_metric.values()):
        raise UserError("no engine could be measured: see the lines above")


def measure(command: list[str]) -> tuple[list[tuple[str, float, str]], str | None]:
    """Runs an engine's program; returns metric, tok/s and version of each figure that it printed, and what went wrong, if
    anything."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return [], f"{command[0]} cannot be run ({error.strerror}): give the Python of its venv"
    found, problem = [], None
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            try:
                figure = json.loads(line)
                metric, value = figure["metric"], float(figure["value"])
                if metric not in METRICS or not (math.isfinite(value) and value > 0):
                    raise ValueError
                found.append((metric, value, str(figure.get("version", ""))))
            except (ValueError, KeyError, TypeError):  # also where too few steps were timed to give a number
                problem = f"it printed a line that holds no figure: {line:.100}"
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        problem = f"it ended with exit code {done.returncode}: {reason:.200}"
    missing = [metric for metric in METRICS if metric not in [name for name, *_ in found]]
    if missing and problem is None:
        problem = f"it gave no {', '.join(missing)}"
    return found, problem


def table(samples: Samples, versions: Mapping[str, str], errors: Mapping[str, str] = MappingProxyType({})) -> str:
    """Returns medians in tok/s with their spread (half of largest − smallest), and our medians as multiples of each peer's.

    `errors` are lines below the table: why values of an engine are missing, or come from fewer rounds.
    """
    width = 22
    lines = [f"{'tok/s':<26}" + "".join(f"{metric:>{width}}" for metric in METRICS)]
    middle = {n: {m: statistics.median(v) for m, v in by.items() if v} for n, by in samples.items()}
    for name, by_metric in samples.items():
        cells = []
        for metric in METRICS:
            values = by_metric[metric]
            cells.append(f"{middle[name][metric]:.1f} ± {(max(values) - min(values)) / 2:.1f}" if values else "–")
        title = f"{name} {versions.get(name, '')}"
        lines.append(f"{title:<26}" + "".join(f"{cell:>{width}}" for cell in cells))
    for peer in samples.keys() - OURS.keys():
        for name in OURS:
            ratios = [
                f"{middle[name][m] / middle[peer][m]:.2f} ×" if m in middle[peer].keys() & middle[name].keys() else "–"
                for m in METRICS
            ]
            lines.append(f"{name + ' / ' + peer:<26}" + "".join(f"{ratio:>{width}}" for ratio in ratios))
    lines += [f"{name}: {error}" for name, error in errors.items()]
    return "\n".join(lines)
