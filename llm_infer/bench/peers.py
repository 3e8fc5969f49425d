"""`llm-infer bench peers`: this engine, in both precisions, and other engines on the same GGUF file, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from llm_infer.errors import UserError
from llm_infer.weights.progress import Progress
from llm_infer.weights.sources import resolve

METRICS = ("decode_b1", "decode_b8", "decode_b32", "prefill_512")
PROGRAMS = {"llama.cpp": "llama_cpp_cpu", "transformers": "transformers_bf16", "openvino": "openvino_genai_cpu"}
OURS = {"ours exact": "exact", "ours fast": "fast"}

Samples = dict[str, dict[str, list[float]]]
"""engine → metric → a value (tok/s) for each round."""


def run(model: str, pythons: Mapping[str, str | None], rounds: int, threads: int | None, json_file: str | None) -> None:
    """Measures every engine once a round, in turn, so that a drift of the machine hits them alike; prints medians."""
    path = resolve(model).path
    if path.suffix != ".gguf":
        raise UserError(f"{path} is not a GGUF file: the peers all read GGUF, choose such a --model")
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
    with Progress().task("Measuring", total=rounds * len(commands)) as bar:
        for _ in range(rounds):
            for name, command in commands.items():
                for line in _json_lines(name, command):
                    samples[name][line["metric"]].append(line["value"])
                    versions[name] = line["version"]
                bar.advance(1)
    print(table(samples, versions))
    if json_file:
        record = {"model": path.name, "threads": threads, "versions": versions, "tok_s": samples}
        Path(json_file).write_text(json.dumps(record, indent=2) + "\n")


def _json_lines(name: str, command: list[str]) -> list[dict]:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{name}: {command[0]} cannot be run ({error.strerror}): give the Python of its venv") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{name}: the measurement ended with exit code {done.returncode}: {reason}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(samples: Samples, versions: Mapping[str, str]) -> str:
    """Medians in tok/s with their spread (half of largest − smallest), and our medians as multiples of each peer's."""
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
            ratios = [f"{middle[name][m] / middle[peer][m]:.2f} ×" if m in middle[peer] else "–" for m in METRICS]
            lines.append(f"{name + ' / ' + peer:<26}" + "".join(f"{ratio:>{width}}" for ratio in ratios))
    return "\n".join(lines)
