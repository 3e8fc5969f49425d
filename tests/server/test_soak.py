"""A server that has run for long is as large as before, and has lost nothing; LLM_INFER_SOAK_SECONDS makes it run for hours."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_process import Process

SECONDS = float(os.environ.get("LLM_INFER_SOAK_SECONDS", "12"))
CLIENTS = 6


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def body(draw: random.Random) -> dict[str, Any]:
    """Some request or other."""
    found: dict[str, Any] = {"prompt": [draw.randrange(5, 490) for _ in range(draw.randrange(1, 60))]}
    found |= {"max_tokens": draw.randrange(1, 30), "seed": draw.randrange(100), "stream": draw.random() < 0.5}
    found |= draw.choice(
        [
            *({}, {"n": 2}, {"logprobs": 3}, {"frequency_penalty": 0.5}, {"stop": ["a", "e"]}, {"min_tokens": 1}),
            *({"structured_outputs": {"choice": ["New York", "Boston"]}}, {"cache_salt": str(draw.randrange(5))}),
        ]
    )
    return found


def figures(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_and_nothing_compiles(tiny_gguf: Path) -> None:
    server = Process(tiny_gguf, "--quiet")
    url = server.url()

    def visit(seconds: float) -> int:
        def some(number: int) -> int:
            draw, done = random.Random(number), 0
            with httpx.Client(base_url=url, timeout=60) as client:
                while time.monotonic() < end:
                    if draw.random() < 0.1:  # leaves in the middle
                        with client.stream("POST", "/v1/completions", json={**body(draw), "stream": True}) as answer:
                            next(answer.iter_lines(), None)
                    else:
                        answer = client.post("/v1/completions", json=body(draw))
                        assert answer.status_code == 200, answer.text
                    done += 1
            return done

        end = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as pool:
            return sum(pool.map(some, range(CLIENTS)))

    with httpx.Client(base_url=url) as client:
        ready = figures(client)
    visit(max(5.0, SECONDS / 4))
    with httpx.Client(base_url=url) as client:
        size = resident(server.process.pid)
        done = visit(SECONDS)
        time.sleep(0.5)
        after, grown = figures(client), resident(server.process.pid)
    assert done > 50
    assert after["llm_infer:compiles_total"] == ready["llm_infer:compiles_total"]  # the first use of anything included
    assert after["llm_infer:num_requests_running"] == after["llm_infer:num_requests_waiting"] == 0
    assert after["llm_infer:kv_cache_usage_perc"] == 0
    assert grown < size * 1.02, f"{size / 1e6:.1f} MB grew to {grown / 1e6:.1f} MB over {done} requests"
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
