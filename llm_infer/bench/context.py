"""`llm-infer bench context`: how the time per token at batch 1 grows with the context, beside the memory speed that bounds it."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llm_infer.bench.lists import whole_numbers
from llm_infer.bench.offline import measure
from llm_infer.engine.step.state import PAGES
from llm_infer.llm import LLM

COPIED_BYTES = 1 << 28


def run(
    model: str, contexts: str, new_tokens: int, rounds: int, precision: str, json_file: str | None, pages: str = "auto"
) -> None:
    """Measures all contexts in turn, `rounds` times, and prints the smallest time of each."""
    lengths = sorted(set(whole_numbers("--contexts", contexts, 1, "lengths", "128,2048")))
    llm = LLM(
        model,
        max_model_len=lengths[-1] + new_tokens,
        max_num_seqs=1,
        enable_prefix_caching=False,
        precision=precision,
        kv_cache_dtype=pages,
    )
    llm.warm_up()
    engine, rng = llm.engine, np.random.default_rng(0)
    seconds = dict.fromkeys(lengths, float("inf"))
    for _ in range(max(1, rounds)):
        for length in lengths:
            tpot = measure(engine, rng, 1, length, new_tokens)["tpot_s"]
            seconds[length] = min(seconds[length], tpot)
    pool = engine.runner.state.cache[PAGES]
    config, layers = engine.runner.model.config, pool.shape[0]
    token_bytes = pool.nbytes // (pool.shape[1] * engine.config.cache.page_size) * config.num_attending // layers
    # Of tokens that layers with a window have left behind nothing is read.
    added = {n: (config.kv_bytes(n) - config.kv_bytes(lengths[0])) / config.kv_bytes_per_token(2) for n in lengths}
    report = growth(seconds, token_bytes, copy_bandwidth(len(os.sched_getaffinity(0))), added)
    print(table(report))
    if json_file:
        Path(json_file).write_text(
            json.dumps({"model": model, "precision": precision, "kv_cache_dtype": pages, **report}, indent=2) + "\n"
        )


def growth(
    seconds: dict[int, float], token_bytes: int, bandwidth: float, added_tokens: dict[int, float] | None = None
) -> dict[str, Any]:
    """Returns each context's time beyond the shortest one's, also as a multiple of the time to read the added keys and values.

    Args:
        seconds: time per token of each context length, the shortest first.
        token_bytes: bytes of keys and values of a token.
        bandwidth: bytes per second.
        added_tokens: tokens that all layers together see more than at the shortest length, by length; None: all of them.
    """
    shortest, rows = next(iter(seconds)), []
    for length, taken in seconds.items():
        added = ((length - shortest) if added_tokens is None else added_tokens[length]) * token_bytes
        extra = taken - seconds[shortest]
        ratio = extra / (added / bandwidth) if added else None
        rows.append({"context": length, "tpot_s": taken, "added_bytes": added, "added_s": extra, "ratio": ratio})
    return {"bandwidth": bandwidth, "token_bytes": token_bytes, "contexts": rows}


def copy_bandwidth(threads: int) -> float:
    """Measures the bytes read and written per second when this many threads copy memory; the best of several runs."""
    source, target = np.ones(COPIED_BYTES, np.uint8), np.zeros(COPIED_BYTES, np.uint8)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            started = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))
            best = min(best, time.perf_counter() - started)
    return 2 * COPIED_BYTES / best


def table(report: dict[str, Any]) -> str:
    """Returns the figures as text."""
    lines = [
        f"copying memory: {report['bandwidth'] / 1e9:.1f} GB/s read and written; "
        f"a token's keys and values: {report['token_bytes'] / 1e3:.1f} kB",
        f"{'context':>8}{'ms/token':>10}{'added ms':>10}{'added KV MB':>13}{'÷ time to read them':>21}",
    ]
    for row in report["contexts"]:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"{row['context']:>8}{1e3 * row['tpot_s']:>10.2f}{1e3 * row['added_s']:>10.2f}"
            f"{row['added_bytes'] / 1e6:>13.1f}{ratio:>21}"
        )
    return "\n".join(lines)
