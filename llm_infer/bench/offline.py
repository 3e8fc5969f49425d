"""`llm-infer bench offline`: measures prefill and decode throughput, latencies, step-time breakdown and page occupancy."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_infer.bench.lists import whole_numbers
from llm_infer.bench.rates import measure
from llm_infer.llm import LLM
from llm_infer.options import EngineOptions
from llm_infer.starting import take_part


def run(
    batch: str,
    prompt_tokens: int,
    new_tokens: int,
    prefill_tokens: int,
    rounds: int,
    json_file: str | None,
    options: EngineOptions,
) -> None:
    """Measures and prints a table; each round goes through all settings, so that drift hits them alike.

    The limits that the runs need are set here, whatever `options` say of them.
    """
    sizes = whole_numbers("--batch", batch, 1, "batch sizes", "1,8,32")
    longest = max(prompt_tokens + new_tokens, prefill_tokens + 1)
    options = replace(
        options,
        max_model_len=longest,
        max_num_seqs=max(2, *sizes),
        max_num_batched_tokens=max(512, *sizes),
        enable_prefix_caching=False,
    )
    if take_part(options):
        return
    llm = LLM.of(options)
    llm.warm_up()
    engine, rng = llm.engine, np.random.default_rng(0)
    runs: dict[str, list[dict[str, Any]]] = {}
    wanted = {f"prefill_{prefill_tokens}": (1, prefill_tokens, 1)}
    wanted |= {f"decode_b{size}": (size, prompt_tokens, new_tokens) for size in sizes}
    for number in range(1, max(1, rounds) + 1):
        for name, (size, prompt, new) in wanted.items():
            found = measure(engine, rng, size, prompt, new)
            runs.setdefault(name, []).append(found)
            row = _table({name: found}, prefill_tokens).splitlines()
            print("\n".join(row if len(runs) == number == 1 else row[2:]), flush=True)
    print(f"medians of {max(1, rounds)} rounds:")
    report = {name: _median(results) for name, results in runs.items()}
    print(_table(report, prefill_tokens))
    compiles = engine.runner.times.compiles_after_warmup
    print(f"programs compiled after warm-up: {compiles}")
    if json_file:
        Path(json_file).write_text(
            json.dumps({"model": str(options.model), "rounds": rounds, "runs": report}, indent=2) + "\n"
        )


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over the rounds in which there is a value."""
    values = {key: [result[key] for result in results if result[key] is not None] for key in results[0]}
    return {key: statistics.median(found) if found else None for key, found in values.items()}


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
