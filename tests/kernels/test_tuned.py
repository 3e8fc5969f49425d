"""Crossovers between kernels: measured data decide, errors name the file, and measuring gives data that can be read."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_ffi, dispatch, tuned
from pallas_kernels.quant_matmul import FORMATS, quant_matmul

pytestmark = pytest.mark.skipif(cpu_ffi.why_not() is not None, reason=f"native CPU kernels: {cpu_ffi.why_not()}")


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from pallas_kernels.cpu_ffi.compile import host_target

    monkeypatch.setenv(tuned.DIRECTORY_VARIABLE, str(tmp_path))
    return tuned.user_file(host_target().cpu)


def choice(rows: int, precision: str = "exact", kind: str = "q8_0") -> dispatch.Choice:
    shapes = {"x": (rows, 64), "blocks": (1, 32, FORMATS[kind].row_items(64))}
    case = dispatch.Case("cpu", "cpu", shapes, {}, {"kind": kind, "precision": precision})
    return dispatch.choose("quant_matmul", case, environ={})


def test_measured_rows_decide_between_native_and_xla(user_file: Path) -> None:
    user_file.write_text(json.dumps({"quant_matmul": {"q8_0": {"native_rows": 16, "int8_rows": 64}}}))
    assert choice(16).name == "cpu" and choice(17).name == "xla"
    assert "more than 16 rows of q8_0" in str(choice(17))
    assert choice(64, "fast").name == "cpu" and choice(65, "fast").name == "xla"
    assert choice(10_000, kind="q4_0").name == "cpu"  # nothing measured


def test_both_ways_give_the_same_product(user_file: Path) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    blocks = rng.integers(0, 60, (2, 32, FORMATS["q8_0"].row_items(64))).astype(np.uint8)
    native = quant_matmul(x, jnp.asarray(blocks), 1, kind="q8_0")
    user_file.write_text(json.dumps({"quant_matmul": {"q8_0": {"native_rows": 0, "int8_rows": 0}}}))
    np.testing.assert_allclose(quant_matmul(x, jnp.asarray(blocks), 1, kind="q8_0"), native, rtol=1e-5, atol=1e-6)


def test_a_broken_file_is_named(user_file: Path) -> None:
    user_file.write_text("{}")
    with pytest.raises(ValueError, match=r"kernels --tune") as error:
        choice(4)
    assert str(user_file) in str(error.value)


def test_measuring_gives_rows_for_each_way(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels.quant_matmul import tune

    monkeypatch.setattr(tune, "ROWS", (1, 8))
    monkeypatch.setattr(tune, "REPEATS", 1)
    measured = dict(tune.measure_kinds(("q4_1", "f32")))
    assert measured.keys() == {"q4_1", "f32"} and measured["q4_1"].keys() == {"native_rows", "int8_rows"}
    assert tuned.write(user_file.stem, measured) == user_file
    assert tuned.crossovers(user_file.stem) == measured


def test_the_last_win_ends_at_the_first_loss() -> None:
    from pallas_kernels.quant_matmul.tune import _last_win

    assert _last_win({1: (1.0, 2.0), 4: (1.0, 2.0)}) is None
    assert _last_win({1: (1.0, 2.0), 4: (3.0, 2.0), 8: (1.0, 2.0)}) == 1
    assert _last_win({1: (3.0, 2.0)}) == 0


def test_the_report_says_where_the_rows_come_from(user_file: Path) -> None:
    from llm_infer.commands.kernels import report

    assert "kernels --tune" in report() or "crossovers from" in report()
    user_file.write_text(json.dumps({"quant_matmul": {"q8_0": {"native_rows": 16, "int8_rows": 0}}}))
    (line,) = [line for line in report().splitlines() if line.startswith("q8_0")]
    assert str(user_file) in report() and "up to 16 rows, then XLA" in line and "never" in line
