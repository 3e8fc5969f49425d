"""Schemathesis makes right and wrong bodies of the description: no answer is a fault, none is what the description denies."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_infer import LLM
from tests.server.conftest import Served

CONFIG = """
[checks]
# Rules between fields (prompt or messages; ids within the vocabulary; what fits the context) are not in the description.
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "404", "429"]
"""


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
@pytest.mark.parametrize("examples", [10, pytest.param(500, marks=pytest.mark.sweep)])
def test_no_body_breaks_the_server(tiny_llm: LLM, examples: int, tmp_path: Path) -> None:
    served = Served(tiny_llm, api_keys=("k",), warm_up="all")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-c", "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"]
    command += ["--config-file", str(tmp_path / "schemathesis.toml"), "run", f"{served.url}/openapi.json"]
    command += ["-H", "Authorization: Bearer k", "--mode", "all", "-n", str(examples), "--checks", "all"]
    command += ["--phases", "examples,coverage,fuzzing", "--generation-deterministic", "--seed", "1"]
    command += ["--max-response-time", "120", "--request-timeout", "120", "--no-color"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    served.wait_until(served.is_idle)
    served.llm.engine.scheduler.check()
    served.stop()
