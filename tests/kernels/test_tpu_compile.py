"""The TPU kernels compiled for chips that are not here, by libtpu in processes of their own: in place, in memory, few spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.targets import TARGETS, environment, why_not
from pallas_kernels.tpu_schedule import dump_arguments

PROGRAM = Path(__file__).parent / "compile_tpu_kernels.py"
MATMULS = Path(__file__).parent / "matmul_programs.py"
TPUS = [name for name, target in TARGETS.items() if target.platform == "tpu"]
# name → arguments of `compile_tpu_kernels.attention`; a copy of pages is compiled for each chip too.
VARIANTS = {
    "v5e": {
        "everything, int8, heads of 64": dict(
            head_dim=64, dtype="int8", window=128, softcap=30.0, sinks=True, scales=True
        ),
        "float8, pages of 16": dict(dtype="float8_e4m3fn", page_size=16, scales=True),
        "heads of 80, no groups": dict(num_heads=8, head_dim=80, page_size=128),
    },
    "v6e": {"heads of 256": dict(num_heads=16, num_kv_heads=4, head_dim=256)},
    "v5p": {"float32, groups of 3": dict(num_heads=24, head_dim=96, dtype="float32", q_dtype="float32")},
    "tpu7x": {},
}


def compile_kernels(name: str, variants: dict, libtpu_arguments: str = "", directory: str = "") -> list[dict]:
    target = TARGETS[name]
    if reason := why_not(target):
        pytest.skip(reason)
    variables = environment(target)
    variables["LIBTPU_INIT_ARGS"] += " " + libtpu_arguments
    done = subprocess.run(
        [sys.executable, str(PROGRAM), name, json.dumps(variants), directory],
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["choice"] == "tpu", row
        assert row["aliased"] >= row["pool"], row
        assert row["temporary"] < row["pool"] / 20, row
        assert row["scoped_memory"] < 0.8 * target.scratch_bytes, row
    return rows


def test_scaled_products_keep_no_bfloat16_copy_of_the_weights():
    """One scale per output feature: no copy at all. One per group: XLA still turns the 8-bit numbers over, no more."""
    target = TARGETS["v5e"]
    if reason := why_not(target):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, str(MATMULS), "v5e", "int8_per_channel", "int8_decode", "int4_decode"],
        env={**os.environ, **environment(target), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    temporaries = json.loads(done.stdout)
    assert set(temporaries) == {"int8_per_channel", "int8_decode", "int4_decode"}
    matrix = 14_336 * 4096  # bytes of the weights as 8-bit numbers; bfloat16 takes twice that
    assert temporaries.pop("int8_per_channel") < matrix / 100
    assert all(size < 1.1 * matrix for size in temporaries.values()), temporaries


@pytest.mark.parametrize("name", TPUS)
def test_kernels_compile_in_place(name):
    rows = compile_kernels(name, VARIANTS[name])
    assert {row["name"] for row in rows} == {*VARIANTS[name], "copy_pages"}


@pytest.mark.parametrize(
    "name", ["v5e", "v6e", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("v5p", "tpu7x"))]
)
def test_few_registers_are_spilled(name, tmp_path):
    """In a block of tokens, of decode and of prefill, as counted in the compiler's schedule."""
    rows = compile_kernels(name, {"mixed": dict(tokens=2048, q_block=128)}, dump_arguments(tmp_path), str(tmp_path))
    (counts,) = (row["counts"] for row in rows if "counts" in row)
    for phase, (executed, spilled) in counts.items():
        assert executed > 500 and spilled <= 0.1 * executed, (phase, executed, spilled)
