"""A damaged model file loads or is refused with one line: no traceback, no hang, no memory beyond a bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("gguf", "safetensors", "json", "orbax")


def _run(kind: str, count: int, timeout: float) -> None:
    command = [sys.executable, "-m", "tests.weights.damaged_child", kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    *faults, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0 and not faults, f"{done.stdout[-4000:]}\n{done.stderr[-3000:]}"
    counts = json.loads(last)
    print(kind, counts)
    assert counts["loaded"] + counts["refused"] == count and counts["refused"] > count // 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_faults(kind: str) -> None:
    _run(kind, 100, 300)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_faults(kind: str) -> None:
    _run(kind, 2000, 3000)
