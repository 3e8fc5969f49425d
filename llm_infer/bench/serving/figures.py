"""Figures of a load, by the names of `vllm bench serve`, and what exactly each says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_infer.bench.serving.client import Outcome
from llm_infer.bench.serving.load import Load

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token after the first",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies of one request in seconds; None where its answer does not show them.

    Attributes:
        ttft: from sending to the first event with text; None without streaming.
        itls: between one event with text and the next. An event may carry several tokens.
        e2el: from sending to the last event with text; without streaming, to the last byte.
        tpot: (e2el − ttft) / (output tokens − 1); None below two tokens.
        output_tokens: as the server counts them; where it does not, events with text.
    """

    ttft: float | None
    itls: list[float]
    e2el: float
    tpot: float | None
    output_tokens: int

    @classmethod
    def of(cls, outcome: Outcome) -> Latencies:
        """Returns the latencies of a request that succeeded."""
        times = outcome.times
        tokens = outcome.output_tokens if outcome.output_tokens is not None else len(times)
        ttft = times[0] - outcome.start if times else None
        e2el = (times[-1] if times else outcome.end) - outcome.start
        tpot = (e2el - ttft) / (tokens - 1) if ttft is not None and tokens > 1 else None
        return cls(ttft, np.diff(times).tolist(), e2el, tpot, tokens)


def figures(
    load: Load,
    metrics: Sequence[str] = tuple(METRICS),
    percentiles: Sequence[float] = (50, 90, 99),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Returns the figures of a load.

    - `duration`: seconds from the start of the load to the end of its last request; rates are per second of it.
    - `completed`, `failed`: requests. Tokens count for completed requests alone.
    - `request_goodput`: rate of requests that keep every limit of `goodput` (metric to milliseconds); None without limits.
      A latency that an answer does not show keeps no limit.
    - `max_output_tokens_per_s`: most tokens in a whole second since the start. An answer's tokens count evenly over its events.
    - `max_concurrent_requests`: most requests that were being answered at one moment.
    - `{statistic}_{metric}_ms`: milliseconds over completed requests; for `itl` over all gaps of all of them.
    - Lists have an entry per request, in the order of sending, in seconds; `start_times` count from the start.
    - `client_cpu_us_per_token`: microseconds of CPU time that this client's thread spent, per output token.
    """
    ordered = sorted(load.outcomes, key=lambda each: each[0].start)
    outcomes = [outcome for outcome, _ in ordered]
    good = [outcome for outcome in outcomes if not outcome.error]
    latencies = {id(outcome): Latencies.of(outcome) for outcome in good}
    of_good = [latencies[id(outcome)] for outcome in good]
    input_lens = [
        outcome.prompt_tokens if outcome.prompt_tokens is not None else plan or 0 for outcome, plan in ordered
    ]
    total_input = sum(length for length, outcome in zip(input_lens, outcomes, strict=True) if not outcome.error)
    total_output = sum(each.output_tokens for each in of_good)
    duration = max(load.ended - load.started, 1e-9)
    tokens_by_second, concurrency = timelines(load)
    kinds = Counter(outcome.error for outcome in outcomes if outcome.error)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "interrupted": load.interrupted,
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "total_cached_tokens": sum(outcome.cached_tokens or 0 for outcome in good),
        "request_throughput": len(good) / duration,
        "request_goodput": _good(of_good, goodput) / duration if goodput else None,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "max_output_tokens_per_s": float(tokens_by_second.max(initial=0.0)),
        "max_concurrent_requests": max((count for _, count in concurrency), default=0),
    }
    for metric in metrics:
        found |= _statistics(metric, _values(metric, of_good), percentiles)
    return {
        **found,
        "client_cpu_s": load.cpu,
        "client_cpu_us_per_token": 1e6 * load.cpu / total_output if total_output else None,
        "error_counts": dict(kinds.most_common()),
        "input_lens": input_lens,
        "output_lens": [latencies[id(each)].output_tokens if not each.error else 0 for each in outcomes],
        "ttfts": [latencies[id(each)].ttft if not each.error else None for each in outcomes],
        "itls": [latencies[id(each)].itls if not each.error else [] for each in outcomes],
        "e2els": [latencies[id(each)].e2el if not each.error else None for each in outcomes],
        "start_times": [each.start - load.started for each in outcomes],
        "errors": [f"{each.error}: {each.message}" if each.error else "" for each in outcomes],
    }


def timelines(load: Load) -> tuple[np.ndarray, list[tuple[float, int]]]:
    """Returns output tokens by second, and the number of running requests from each time on that it changes, in seconds."""
    seconds = np.zeros(int(max(load.ended - load.started, 0.0)) + 1)
    changes: list[tuple[float, int]] = []
    for outcome, _ in load.outcomes:
        changes += [(outcome.start - load.started, 1), (outcome.end - load.started, -1)]
        if outcome.error:
            continue
        times = np.array(outcome.times or [outcome.end]) - load.started
        tokens = outcome.output_tokens if outcome.output_tokens is not None else len(outcome.times)
        np.add.at(seconds, np.clip(times.astype(int), 0, len(seconds) - 1), tokens / len(times))
    running, steps = 0, []
    for time, change in sorted(changes):
        running += change
        steps.append((time, running))
    return seconds, steps


def _values(metric: str, latencies: Sequence[Latencies]) -> np.ndarray:
    """Returns a metric's values in milliseconds."""
    if metric == "itl":
        values = [gap for each in latencies for gap in each.itls]
    else:
        values = [value for each in latencies if (value := getattr(each, metric)) is not None]
    return 1e3 * np.array(values, float)


def _statistics(metric: str, values: np.ndarray, percentiles: Sequence[float]) -> dict[str, float | None]:
    """Returns mean, median, standard deviation and percentiles (linearly interpolated); None of no values."""
    names = {f"p{each:g}_{metric}_ms": each for each in percentiles}
    if not len(values):
        return dict.fromkeys([*(f"{name}_{metric}_ms" for name in ("mean", "median", "std")), *names])
    return {
        f"mean_{metric}_ms": float(values.mean()),
        f"median_{metric}_ms": float(np.median(values)),
        f"std_{metric}_ms": float(values.std()),
        **{name: float(np.percentile(values, each)) for name, each in names.items()},
    }


def _good(latencies: Sequence[Latencies], limits: Mapping[str, float]) -> int:
    """Counts the requests that keep every limit; one token has no time per token, which keeps any limit of it."""

    def keeps(each: Latencies, metric: str, limit: float) -> bool:
        value = getattr(each, metric)
        if metric == "tpot" and each.output_tokens <= 1:
            return True
        return value is not None and 1e3 * value <= limit

    return sum(all(keeps(each, *limit) for limit in limits.items()) for each in latencies)
