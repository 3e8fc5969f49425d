"""The engine's whole step compiles for a GPU that is not here, with the GPU kernels, copying neither pages nor weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llm_infer.engine.platform import CUBLAS_ALONE_SINCE, compiler_options, layer_loop, query_rows
from pallas_kernels.targets import TARGETS, environment, why_not

CUBLAS_ALONE = jax.__version_info__ >= CUBLAS_ALONE_SINCE
PROGRAM = Path(__file__).with_name("gpu_step_program.py")


def test_step_of_llama_8b_compiles_for_h200() -> None:
    reason = why_not(TARGETS["sm_90"])
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, **environment(TARGETS["sm_90"]), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for numerics, step in found["steps"].items():
        assert step["alias"] >= found["pool"], numerics
        assert step["temporary"] < found["pool"] / 16, numerics
        invariant = numerics == "invariant"
        assert step["fixed order"] == [invariant] * 2, step
        assert all(step["ours"]), step
        # The host would have to wait for what decides about a loop or a branch, and the step would not be one CUDA graph.
        assert step["waits"] == 0, step
        assert (step["triton products"] == 0) == (CUBLAS_ALONE or invariant), step
        assert (step["cublas"] > 0) == (CUBLAS_ALONE and not invariant), step
    # A few rows of logits are all that a small step keeps, beside cuBLAS' 32 MiB: less than the smallest matrix of a layer.
    assert found["steps"]["auto"]["temporary"] < found["smallest_matrix"] + ((32 << 20) if CUBLAS_ALONE else 0)


def test_loop_form_and_item_rows_of_each_platform() -> None:
    assert [layer_loop(platform) for platform in ("cpu", "gpu", "tpu")] == [1, "unroll", 4]
    assert [query_rows("gpu", group) for group in (1, 4, 8, 71)] == [128, 32, 16, 8] and query_rows("cpu", 3) == 32
    assert [query_rows("tpu", group) for group in (1, 4, 8, 71)] == [128, 128, 64, 16]


def test_only_plain_weights_on_a_gpu_leave_triton_products_out() -> None:
    plain, quantised = (
        {"w": jax.ShapeDtypeStruct((2, 8, 8), jnp.bfloat16), "v": jax.ShapeDtypeStruct((8,), dtype)}
        for dtype in (jnp.bfloat16, jnp.float8_e4m3fn)
    )
    assert compiler_options("gpu", plain) == ({"xla_gpu_enable_triton_gemm": False} if CUBLAS_ALONE else {})
    assert compiler_options("gpu", plain, "invariant")["xla_allow_excess_precision"] is False
    assert not compiler_options("gpu", quantised) and not compiler_options("cpu", plain)
