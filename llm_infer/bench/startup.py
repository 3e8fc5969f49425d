"""`llm-infer bench startup`: measures the seconds from a command's start to its first token, with empty and with filled
caches."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Progress
from llm_infer.weights.sources import resolve

PROMPT = "Why is the sky blue?"


def run(model: str, rounds: int, json_file: str | None) -> None:
    """Starts `llm-infer generate` in processes of their own; the weights are on disk before the clock starts."""
    path = resolve(model, progress=Progress()).path
    with tempfile.TemporaryDirectory() as folder:
        # Compiled programs and compiled kernels go to an empty folder: cold is a newcomer's first run.
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/xla",
            "LLM_INFER_CPU_CACHE_DIR": f"{folder}/kernels",
            "LLM_INFER_CONFIG": "",  # the user's defaults are not what is measured
        }
        cold = time_to_first_token(str(path), environment)
        warm = [time_to_first_token(str(path), environment) for _ in range(max(1, rounds))]
    figures = {"cold_s": cold, "warm_s": statistics.median(warm), "warm_rounds_s": warm}
    print(f"first token of `llm-infer generate`, weights on disk: cold {cold:.1f} s, warm {figures['warm_s']:.1f} s")
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n")


def time_to_first_token(model: str, environment: dict[str, str]) -> float:
    """Measures the seconds until the first byte of the answer."""
    command = [
        sys.executable,
        "-m",
        "llm_infer.commands.app",
        "generate",
        PROMPT,
        "--model",
        model,
        "--max-tokens",
        "2",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    elapsed = time.perf_counter() - started
    _, errors = process.communicate()
    if process.returncode or not first:
        raise UserError(f"llm-infer generate failed: {errors.decode(errors='replace').strip()[-500:]}")
    return elapsed
