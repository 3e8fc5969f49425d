"""Rates and latencies of an engine on one batch of random prompts; needs no tokenizer."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.scheduler.request import Request


def measure(engine: Engine, rng: np.random.Generator, size: int, prompt: int, new: int) -> dict[str, Any]:
    """Runs one batch of random prompts, greedily continued to full length. Times are in seconds, rates in tokens per second."""
    before = {**asdict(engine.times), **asdict(engine.runner.times)}
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    prompts = rng.integers(10, min(1000, engine.vocab_size), (size, prompt)).tolist()
    requests = [engine.add_request(ids, params) for ids in prompts]
    decode_steps: list[tuple[float, int]] = []
    occupancy, started = 0.0, time.perf_counter()
    while engine.has_work:
        step_started = time.perf_counter()
        events = engine.step()
        occupancy = max(occupancy, engine.scheduler.usage(0))
        if all(request.first_token_time for request in requests) and len(events) >= size:
            decode_steps.append((time.perf_counter() - step_started, len(events)))
    elapsed = time.perf_counter() - started
    after = {**asdict(engine.times), **asdict(engine.runner.times)}
    spent = {key: after[key] - before[key] for key in after}
    # The first and last steps of a batch also carry prefill and the drain of the pipeline.
    steady = [seconds * size / tokens for seconds, tokens in decode_steps[1:-1]]  # per token of each sequence
    return {
        "ttft_s": statistics.median(_span(r, "first_token_time") for r in requests),
        "tpot_s": statistics.median(steady) if steady else None,
        "decode_tok_s": size / statistics.median(steady) if steady else None,
        "total_tok_s": size * (prompt + new) / elapsed,
        "prefill_tok_s": size * prompt / max(_span(r, "first_token_time") for r in requests),
        "page_occupancy": occupancy,
        "steps": spent["steps"],
        **{
            f"{name}_ms_per_step": 1e3 * spent[name] / max(1, spent["steps"])
            for name in ("schedule", "prepare", "dispatch", "device", "commit")
        },
    }


def _span(request: Request, name: str) -> float:
    end = getattr(request, name)
    assert end is not None and request.arrival_time is not None
    return end - request.arrival_time
