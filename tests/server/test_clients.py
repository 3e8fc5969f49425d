"""Other projects' clients hold a conversation with the server; run with -m clients and an interpreter that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_infer import LLM, SamplingParams
from tests.server.conftest import Served

PYTHON = os.environ.get("LLM_INFER_CLIENTS_PYTHON", sys.executable)
NODE_MODULES = os.environ.get("LLM_INFER_CLIENTS_NODE", "")
SCRIPTS = Path(__file__).with_name("client_scripts.py")
PACKAGES = {
    "openai": "openai",
    "langchain": "langchain_openai",
    "litellm": "litellm",
    "instructor": "instructor",
    "pydantic_ai": "pydantic_ai",
    "lm_eval": "lm_eval",
}
pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def tools_served(tiny_llm: LLM) -> Iterator[Served]:
    found = Served(tiny_llm, tool_call_parser="hermes")
    yield found
    found.stop()


def require(name: str) -> None:
    if subprocess.run([PYTHON, "-c", f"import {PACKAGES[name]}"], capture_output=True).returncode:
        pytest.skip(f"{PACKAGES[name]} is not installed")


def check(done: subprocess.CompletedProcess[str]) -> None:
    """What a script printed is a conversation as it should be."""
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "streamed" in found:
        assert found["plain"] and found["streamed"] == found["plain"]
    if "called" in found:
        ((function, arguments),) = found["called"]
        assert function == "weather" and arguments["city"] in ("Rome", "Oslo")
        assert found["called in a stream"] == found["called"]
    assert set(found.get("typed", ["bool"])) == {"bool"}
    assert found.get("embedded", 64) == 64


@pytest.mark.parametrize("name", ["openai", "langchain", "litellm", "instructor", "pydantic_ai"])
def test_a_conversation(tools_served: Served, name: str) -> None:
    require(name)
    command = [PYTHON, str(SCRIPTS), name, f"{tools_served.url}/v1"]
    check(subprocess.run(command, capture_output=True, text=True, timeout=120))


@pytest.mark.skipif(not NODE_MODULES, reason="LLM_INFER_CLIENTS_NODE names no folder with node_modules of the AI SDK")
def test_a_conversation_of_the_ai_sdk(tools_served: Served) -> None:
    command = ["node", str(SCRIPTS.with_name("client_ai_sdk.mjs")), f"{tools_served.url}/v1", NODE_MODULES]
    check(subprocess.run(command, capture_output=True, text=True, timeout=120))


def test_lm_eval_scores_what_llm_scores(served: Served, tmp_path: Path) -> None:
    require("lm_eval")
    rows = [
        {"question": f"The page {word} is", "choices": [" a table", " free", " copied on write"], "answer": 0}
        for word in ("table", "pool", "map", "of a book")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "ours.yaml").write_text(json.dumps(task))
    model = f"model=tiny,base_url={served.url}/v1/completions,tokenizer_backend=remote,tokenized_requests=True,max_retries=1"
    command = [PYTHON, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model, "--tasks", "ours"]
    command += ["--include_path", str(tmp_path), "--log_samples", "--output_path", str(tmp_path / "out")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    served.wait_until(served.is_idle)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        doc = sample["doc"]
        for (logprob, greedy), choice in zip(sample["filtered_resps"], doc["choices"], strict=True):
            # As the harness does: no token that begins a sequence, the border where the context's tokens end.
            encode = partial(served.llm.tokenizer.encode, add_special_tokens=False)
            ids, start = encode(doc["question"] + choice), len(encode(doc["question"]))
            at = served.llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
            assert at is not None
            found = [(at[i] or {})[ids[i]] for i in range(start, len(ids))]
            assert float(logprob) == pytest.approx(sum(one.logprob for one in found), abs=1e-3)
            assert (greedy in (True, "True")) == all(one.rank == 1 for one in found)
