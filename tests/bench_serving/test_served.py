"""The load against the real server with a tiny model: exact lengths, shared prefixes, turns and chats."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from llm_infer.bench.serving.datasets import Lengths
from llm_infer.bench.serving.figures import figures
from llm_infer.bench.serving.run import measure, run
from llm_infer.bench.serving.settings import Settings
from tests.server.conftest import Served, served, tiny_gguf, tiny_llm

__all__ = ["served", "tiny_gguf", "tiny_llm"]


def test_our_server_counts_what_was_planned(served: Served) -> None:
    settings = Settings(
        served.url, num_prompts=6, lengths=Lengths(20, 5), fields={"ignore_eos": True, "temperature": 0}
    )
    model, load = asyncio.run(measure(settings))
    found = figures(load)
    assert model == "tiny" and found["error_counts"] == {}
    assert found["input_lens"] == [20] * 6 and found["output_lens"] == [5] * 6
    assert found["total_cached_tokens"] == 0 and found["mean_ttft_ms"] > 0 and found["mean_tpot_ms"] > 0


def test_blocks_of_a_trace_are_cached_by_the_server(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [{"timestamp": at, "input_length": 900, "output_length": 2, "hash_ids": [7, at]} for at in (1, 2, 3)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    settings = Settings(served.url, dataset="timed_trace", path=str(file), max_input=100, max_concurrency=1)
    _, load = asyncio.run(measure(settings))
    cached = [outcome.cached_tokens or 0 for outcome, _ in load.outcomes]
    assert cached[0] == 0 and min(cached[1:]) >= 64, cached


@pytest.mark.parametrize("stream", [True, False])
def test_chats_of_two_turns(stream: bool, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(
        served.url,
        "openai-chat",
        num_prompts=2,
        lengths=Lengths(3, 4, turns=2),
        stream=stream,
        fields={"ignore_eos": True},
    )
    run(settings)
    out = capsys.readouterr().out
    assert "requests that succeeded                              4" in out and "Errors" not in out
