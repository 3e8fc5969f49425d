"""`llm-infer bench peers`: measures this engine, in both precisions, and other engines on the same model, in turn."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from llm_infer.base.errors import UserError
from llm_infer.bench.lists import whole_numbers
from llm_infer.bench.peer_process import figures
from llm_infer.bench.peer_programs.reporting import PREFILL, SIZES, depth_metric
from llm_infer.bench.peer_table import Row, record, table
from llm_infer.weights.sources import ModelSource, resolve

METRICS = (*(f"decode_b{size}" for size in SIZES), f"prefill_{PREFILL}")
PROGRAMS = {
    "llama.cpp": "llama_cpp_cpu",
    "ik_llama.cpp": "ik_llama_cpp_cpu",
    "openvino": "openvino_genai_cpu",
    "transformers": "transformers_bf16",
    "mistral.rs": "mistralrs_cpu",
}
READ_DIRECTORIES = ("transformers",)
"""Peers that also load a directory of safetensors; all load GGUF files."""
OURS = {"ours exact": "exact", "ours fast": "fast"}


def run(
    model: str,
    pythons: Mapping[str, str | None],
    rounds: int,
    threads: int | None,
    json_file: str | None,
    depths: str = "",
    limit: float = 1200.0,
) -> None:
    """Measures every engine once per round, in turn, so that a drift of the machine hits them alike; prints medians.

    Each figure is printed, and written to the file, as it comes. An engine that fails is left out of later rounds; its
    figures so far count.

    Args:
        model: name of the model.
        pythons: of each peer that is to be measured, by its name.
        rounds: how often each engine runs.
        threads: of each engine; None takes all cores.
        json_file: gets all values, anew after each figure.
        depths: numbers of tokens before the steps of more measurements at batch 1, comma separated.
        limit: seconds that an engine may take for a figure.

    Raises:
        UserError: no engine could be measured.
    """
    ahead = sorted(set(whole_numbers("--depth", depths, 0, "numbers of tokens", "0,2048"))) if depths else []
    source, threads = resolve(model), threads or len(os.sched_getaffinity(0))
    metrics = (*METRICS, *map(depth_metric, ahead))
    commands = _commands(source, pythons, threads, ahead)
    rows = {name: Row(error=_unreadable(source, name)) for name in commands}

    def keep() -> None:
        if json_file:
            known = {"model": source.path.name, "threads": threads, "rounds": rounds}
            Path(json_file).write_text(json.dumps({**known, **record(rows, metrics)}, indent=2) + "\n")

    for number in range(1, rounds + 1):
        for name, command in commands.items():
            if rows[name].error is None:
                print(f"round {number}, {name}:", end="", flush=True)
                _measure(command, rows[name], metrics, limit, keep)
    size = f" ({source.path.stat().st_size / 1e6:.0f} MB)" if source.path.is_file() else ""
    told = f"medians of {rounds} rounds ± half the spread" if rounds > 1 else "of one round"
    print(f"\n{source.path.name}{size}, {threads} threads; tok/s, {told}, and ratios of them:")
    print(table(rows, metrics, list(OURS)))
    if not any(row.medians() for row in rows.values()):
        raise UserError("no engine could be measured: see the lines above")


def _commands(
    source: ModelSource, pythons: Mapping[str, str | None], threads: int, depths: Sequence[int]
) -> dict[str, list[str]]:
    """Returns the program of each engine with its arguments."""
    arguments = [str(source.path), str(threads), ",".join(map(str, depths))]
    folder = Path(__file__).parent / "peer_programs"
    ours = [sys.executable, "-m", "llm_infer.bench.peer_ours", *arguments]
    found = {name: [*ours, precision] for name, precision in OURS.items()}
    for name, python in pythons.items():
        if python is not None:
            found[name] = [python, str(folder / f"{PROGRAMS[name]}.py"), *arguments]
    return found


def _unreadable(source: ModelSource, name: str) -> str | None:
    """Says why an engine cannot read this model, if it cannot."""
    if name in OURS or source.kind == "gguf" or (source.kind == "huggingface" and name in READ_DIRECTORIES):
        return None
    return f"it does not read {source.path.name}: choose a --model that is a GGUF file"


def _measure(command: Sequence[str], row: Row, metrics: Sequence[str], limit: float, keep: Callable[[], None]) -> None:
    """Runs an engine's program once, fills its row, and prints what comes; `keep` is called after each figure."""
    absent = list(metrics)
    try:
        with closing(figures(command, limit)) as found:
            for figure in found:
                if figure.metric not in absent:
                    continue
                absent.remove(figure.metric)
                row.version, row.precision = figure.version, figure.precision
                if figure.value is None:
                    row.missing[figure.metric] = figure.why
                    print(f" no {figure.metric},", end="", flush=True)
                else:
                    row.samples.setdefault(figure.metric, []).append(figure.value)
                    print(f" {figure.metric} {figure.value:.1f},", end="", flush=True)
                keep()
        if absent:
            raise UserError(f"it gave no {', '.join(absent)}")
        print(" done", flush=True)
    except UserError as error:
        row.error = str(error)
        print(f" left out from here on: {error}", flush=True)
        keep()
