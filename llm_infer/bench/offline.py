"""`llm-infer bench offline`: prefill and decode throughput, latencies, step-time breakdown and page occupancy."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.errors import UserError
from llm_infer.llm import LLM
from llm_infer.scheduler.request import Request


def run(
    model: str,
    batch: str,
    prompt_tokens: int,
    new_tokens: int,
    prefill_tokens: int,
    rounds: int,
    json_file: str | None,
    load_format: str = "auto",
    precision: str = "exact",
    num_scheduler_steps: int = 1,
) -> None:
    """Measures and prints a table; rounds go through all settings in turn, so that drift hits them alike."""
    sizes = _batch_sizes(batch)
    longest = max(prompt_tokens + new_tokens, prefill_tokens + 1)
    llm = LLM(
        model,
        max_model_len=longest,
        max_num_seqs=max(2, *sizes),
        max_num_batched_tokens=max(512, *sizes),
        enable_prefix_caching=False,
        load_format=load_format,
        precision=precision,
        num_scheduler_steps=num_scheduler_steps,
    )
    llm.warm_up()
    engine, rng = llm.engine, np.random.default_rng(0)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(max(1, rounds)):
        runs.setdefault(f"prefill_{prefill_tokens}", []).append(measure(engine, rng, 1, prefill_tokens, 1))
        for size in sizes:
            runs.setdefault(f"decode_b{size}", []).append(measure(engine, rng, size, prompt_tokens, new_tokens))
    report = {name: _median(results) for name, results in runs.items()}
    print(_table(report, prefill_tokens))
    compiles = engine.runner.times.compiles_after_warmup
    print(f"programs compiled after warm-up: {compiles}")
    if json_file:
        Path(json_file).write_text(json.dumps({"model": model, "rounds": rounds, "runs": report}, indent=2) + "\n")


def measure(engine: Engine, rng: np.random.Generator, size: int, prompt: int, new: int) -> dict[str, Any]:
    """One batch of random prompts, greedily continued to full length. Times in seconds, rates in tokens per second."""
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


def _batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch {text!r}: expected batch sizes separated by commas, such as 1,8,32")
    return sizes


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: None if results[0][key] is None else statistics.median(result[key] for result in results)
        for key in results[0]
    }


def _table(report: dict[str, dict[str, Any]], prefill_tokens: int) -> str:
    lines = [
        f"{'run':<14}{'prefill':>10}{'decode':>10}{'TTFT':>9}{'TPOT':>9}{'pages':>8}"
        f"{'schedule':>10}{'prepare':>9}{'dispatch':>10}{'device':>9}{'commit':>9}",
        f"{'':<14}{'tok/s':>10}{'tok/s':>10}{'ms':>9}{'ms':>9}{'used':>8}{'ms/step':>10}{'ms/step':>9}{'ms/step':>10}"
        f"{'ms/step':>9}{'ms/step':>9}",
    ]
    for name, r in report.items():
        decode = f"{r['decode_tok_s']:.1f}" if r["decode_tok_s"] else "–"
        tpot = f"{1e3 * r['tpot_s']:.1f}" if r["tpot_s"] else "–"
        lines.append(
            f"{name:<14}{r['prefill_tok_s']:>10.1f}{decode:>10}{1e3 * r['ttft_s']:>9.1f}{tpot:>9}"
            f"{r['page_occupancy']:>8.1%}{r['schedule_ms_per_step']:>10.2f}{r['prepare_ms_per_step']:>9.2f}"
            f"{r['dispatch_ms_per_step']:>10.2f}{r['device_ms_per_step']:>9.1f}{r['commit_ms_per_step']:>9.2f}"
        )
    return "\n".join(lines)
