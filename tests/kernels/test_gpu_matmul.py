"""What the GPU compiler makes of grouped and scaled products: no dequantised weights in memory, no spills, shared memory fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.gpu_resources import dump_flags, read_dump
from pallas_kernels.targets import TARGETS, environment, why_not

PROGRAM = Path(__file__).with_name("matmul_programs.py")


def test_products_compile_for_hopper_without_temporaries_or_spills(tmp_path: Path) -> None:
    target = TARGETS["sm_90"]
    reason = why_not(target)
    if reason is not None:
        pytest.skip(reason)
    variables = environment(target)
    variables["XLA_FLAGS"] += " " + dump_flags(tmp_path)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), target.name],
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    matrix = 14_336 * 4096  # bytes of the smallest form in which a dequantised matrix could be kept
    for name, temporary in found.items():
        assert temporary < matrix / 4, (name, temporary)
        kernels = read_dump(tmp_path, f"jit_{name}", "grouped_matmul|scaled_matmul")
        assert bool(kernels) == (not name.endswith("per_channel")), name
        for kernel in kernels:
            assert kernel.spill_bytes == 0 and kernel.blocks_per_multiprocessor >= 1, (name, kernel)
            assert kernel.shared_bytes <= target.scratch_bytes, (name, kernel)
            print(name, kernel)
