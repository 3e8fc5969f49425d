"""The figures of a load as a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_infer.bench.serving.figures import METRICS

ROWS = (
    ("completed", "requests that succeeded", ""),
    ("failed", "requests that failed", ""),
    ("duration", "duration", "s"),
    ("total_input_tokens", "prompt tokens", ""),
    ("total_cached_tokens", "of them cached by the server", ""),
    ("total_output_tokens", "output tokens", ""),
    ("request_throughput", "request throughput", "requests/s"),
    ("request_goodput", "goodput (requests within the limits)", "requests/s"),
    ("output_throughput", "output throughput", "tokens/s"),
    ("total_token_throughput", "prompt and output throughput", "tokens/s"),
    ("max_output_tokens_per_s", "most output tokens in a second", "tokens/s"),
    ("max_concurrent_requests", "most requests at once", ""),
    ("client_cpu_us_per_token", "CPU time of this client", "µs/token"),
)
"""Figures, what tables call them, and their units."""


def rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns name, value and unit of each figure that is there."""
    return [(label, number(found[name]), unit) for name, label, unit in ROWS if found[name] is not None]


def latency_rows(
    found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]
) -> list[tuple[str, list[str]]]:
    """Returns a row of milliseconds for each metric: mean, median, standard deviation, percentiles."""
    names = ["mean", "median", "std", *(f"p{each:g}" for each in percentiles)]
    return [(METRICS[each], [number(found[f"{name}_{each}_ms"]) for name in names]) for each in metrics]


def number(value: float | None) -> str:
    """Returns a number as tables show it; "–" for none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def table(found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """Returns all figures, and the errors by kind."""
    lines = ["interrupted: figures of what had ended by then"] if found["interrupted"] else []
    lines += [f"{label:<40}{value:>14} {unit}".rstrip() for label, value, unit in rows(found)]
    heads = ["mean", "median", "std", *(f"P{each:g}" for each in percentiles)]
    if metrics:
        lines += ["", "Latencies in ms".ljust(40) + "".join(f"{each:>11}" for each in heads)]
    lines += [
        f"{label:<40}" + "".join(f"{value:>11}" for value in values)
        for label, values in latency_rows(found, metrics, percentiles)
    ]
    if found["error_counts"]:
        lines += ["", "Errors"]
        for kind, count in found["error_counts"].items():
            example = next(each for each in found["errors"] if each.startswith(f"{kind}: ")).partition(": ")[2]
            lines.append(f"{count:>6} × {kind}" + (f", such as: {example}" if example else ""))
    return "\n".join(lines)
