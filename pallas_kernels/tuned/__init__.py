"""Measured crossovers between kernels by type of CPU: this user's measurement, else the data shipped here, else none.

A file is named after LLVM's name of the CPU and holds, for each kind of weights, row counts:
`{"quant_matmul": {"q8_0": {"int8_rows": 4, "native_rows": null}}}`. Up to `int8_rows` activation rows precision `fast` rounds
activations to int8; up to `native_rows` the native kernel beats XLA's dot on dequantised weights. null is "always".
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

from pallas_kernels.cache_folder import cache_folder

DIRECTORY_VARIABLE = "LLM_INFER_TUNED_DIR"

Crossovers = dict[str, dict[str, int | None]]
"""Kind of weights → crossover → rows."""


def user_directory() -> Path:
    """Returns the folder of measurements: $LLM_INFER_TUNED_DIR, else tuned in the user's cache folder."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    return Path(chosen) if chosen else cache_folder() / "tuned"


def user_file(cpu: str) -> Path:
    """Returns the file in which `llm-infer kernels --tune` keeps its results."""
    return user_directory() / f"{cpu}.json"


def shipped_file(cpu: str) -> Path:
    """Returns the file of this package's data for a CPU."""
    return Path(__file__).parent / f"{cpu}.json"


def source_of(cpu: str) -> Path | None:
    """Returns the file that counts for a CPU; None where nothing was measured."""
    return next((path for path in (user_file(cpu), shipped_file(cpu)) if path.is_file()), None)


@cache
def _read(path: Path, _mtime: int) -> Crossovers:
    return json.loads(path.read_text())["quant_matmul"]


def crossovers(cpu: str) -> Crossovers:
    """Returns the measured crossovers of the quantised matmul on a CPU; empty where nothing was measured.

    Raises:
        ValueError: the file cannot be read.
    """
    path = source_of(cpu)
    if path is None:
        return {}
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected crossovers as JSON, found {error}; run `llm-infer kernels --tune`"
        ) from None


def block_sizes(device: str, op: str) -> dict[str, dict[str, int]]:
    """Returns measured block sizes of an op on an accelerator: the op's name for the case → field → value; empty without any.

    The file is named after the device with underscores for spaces and may hold several ops:
    `{"paged_attention": {"bfloat16-128-decode": {"tile": 64, …}}}`.

    Raises:
        ValueError: the file cannot be read.
    """
    path = source_of(device.replace(" ", "_"))
    try:
        return {} if path is None else json.loads(path.read_text()).get(op, {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected block sizes as JSON, found {error}") from None


def write(cpu: str, measured: Crossovers) -> Path:
    """Keeps a measurement for this user; returns its file."""
    path = user_file(cpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"quant_matmul": measured}, indent=2) + "\n")
    return path
