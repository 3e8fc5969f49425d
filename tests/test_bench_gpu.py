"""The script for a GPU machine runs to its end with tiny sizes, needs few packages, and the static record has figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_infer.bench.compiled import gpu as kernels_gpu
from llm_infer.bench.gpu.run import markdown
from pallas_kernels.targets import TARGETS, why_not

SCRIPT = """
import sys

class Missing:  # packages that a GPU machine need not have
    names = {"orbax", "gguf", "tokenizers", "huggingface_hub", "safetensors", "jinja2", "torch"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from llm_infer.bench.__main__ import main
sys.exit(main(["gpu", "--small", "--out", sys.argv[1]]))
"""


def test_script_runs_on_a_cpu_without_most_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["errors"]
    rows = report["sections"]
    checks = [row["ok"] for row in rows["correctness"]]
    assert len(checks) >= 2 and all(ok in (True, None) for ok in checks) and True in checks
    assert rows["draws"][0]["ok"]
    for name in ("attention", "blocks", "draws"):
        assert any(row.get("µs", 0) > 0 for row in rows[name]), rows[name]
    assert all(row["decode tok/s"] > 0 and row["compiled late"] == 0 for row in rows["engine"][1:])
    assert (tmp_path / "gpu.md").read_text() == markdown(report)
    assert "| decode B=2 ctx=64 | gpu_triton |" in markdown(report)


def test_static_record_of_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["sm_90"]
    if reason := why_not(target):
        pytest.skip(reason)
    rows = list(kernels_gpu.record(target, (0, 3)))
    assert {row["shape"] for row in rows} == {"decode B=64 ctx=4096", "prefill 2048"}
    (decode,) = [
        row for row in rows if row["shape"] == "decode B=64 ctx=4096" and row["GFLOP"] and "triton" in str(row)
    ]
    # 64 sequences of 4096 tokens, 8 heads of 128, K and V in 2 bytes, at 4.8 TB/s.
    assert decode["KV MB"] == pytest.approx(1073.7, abs=0.1) and decode["roofline µs"] == pytest.approx(223.7, abs=0.1)
    assert all(row["spill B"] == 0 and row["blocks per SM"] >= 1 and 0 < row["registers"] <= 255 for row in rows)
