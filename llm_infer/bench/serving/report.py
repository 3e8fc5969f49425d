"""The report of a load as one HTML page that loads nothing: plots, figures with their units, errors, settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from llm_infer.bench.serving.figures import METRICS, timelines
from llm_infer.bench.serving.load import Load
from llm_infer.bench.serving.plots import histogram, over_time
from llm_infer.bench.serving.table import latency_rows, rows

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2024; --soft: #60646c; --rule: #e0e1e6; --page: #fff; --mark: #3a6ea5; --line: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #a8adb5; --rule: #363a3f; --page: #16181a; --mark: #70a7dd; --line: #f0883e }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 74rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
h3 { font-size: .95rem; margin: .5rem 0 0 }
.soft, th { color: var(--soft); font-weight: normal } .wide { overflow-x: auto }
table { border-collapse: collapse }
td, th { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--rule); text-align: left }
.number { text-align: right; font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1rem 2rem }
svg { width: 100%; height: auto; font-size: 11px } svg text { fill: var(--soft) }
.grid { stroke: var(--rule) } .bar { fill: var(--mark) } .mark { stroke: var(--line); stroke-dasharray: 3 3 }
.line { fill: none; stroke: var(--mark); stroke-width: 1.5 }
"""


def page(
    load: Load,
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    metrics: Sequence[str],
    percentiles: Sequence[float],
) -> str:
    """Returns the page.

    Args:
        load: that was measured.
        found: its figures.
        settings: names and values to show.
        metrics, percentiles: as the figures have them.
    """
    heads = ["mean", "median", "std", *(f"P{each:g}" for each in percentiles)]
    state = "Interrupted: figures of what had ended by then. " if found["interrupted"] else ""
    parts = [
        f"<h1>Load test of {escape(str(settings['model_id']))}</h1>",
        f'<p class="soft">{state}{escape(str(settings["base_url"]))}{escape(str(settings["endpoint"]))}, '
        f"{escape(str(settings['date']))}</p>",
        "<h2>Figures</h2>",
        _table((), ([label, value, unit] for label, value, unit in rows(found)), numbers=(1,)),
        "<h2>Latencies in ms</h2>",
        _table(
            ["", *heads],
            ([label, *values] for label, values in latency_rows(found, metrics, percentiles)),
            numbers=range(1, len(heads) + 1),
        ),
        '<div class="plots">',
        *_distributions(found),
        "</div><h2>Over time</h2>",
        '<div class="plots">',
        *_timelines(load),
        "</div>",
    ]
    if found["error_counts"]:
        examples = {text.partition(": ")[0]: text.partition(": ")[2] for text in reversed(found["errors"]) if text}
        errors = ([str(count), kind, examples[kind]] for kind, count in found["error_counts"].items())
        parts += ["<h2>Errors</h2>", _table(["requests", "kind", "such as"], errors, numbers=(0,))]
    shown = ([name, str(value)] for name, value in settings.items() if value is not None and value != {})
    parts += ["<h2>Settings</h2>", _table((), shown)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Load test of {escape(str(settings['model_id']))}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if index in right else "" for index in range(len(cells))]
        marked = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    head = [row(heads, "th")] if heads else []
    return f'<div class="wide"><table>{"".join([*head, *(row(line, "td") for line in lines)])}</table></div>'


def _distributions(found: Mapping[str, Any]) -> Iterable[str]:
    """Draws how the times to the first token, between tokens and of whole requests are distributed."""
    for metric, values, count in (
        ("ttft", found["ttfts"], "requests"),
        ("itl", [gap for each in found["itls"] for gap in each], "gaps"),
        ("e2el", found["e2els"], "requests"),
    ):
        times = 1e3 * np.array([each for each in values if each is not None], float)
        if len(times):
            marks = {"P50": float(np.median(times)), "P99": float(np.percentile(times, 99))}
            yield f"<div><h3>{METRICS[metric]}</h3>{histogram(times, 'ms', count, marks)}</div>"


def _timelines(load: Load) -> Iterable[str]:
    """Draws running requests and output tokens per second."""
    tokens, running = timelines(load)
    end = max(load.ended - load.started, 1e-3)
    by_second = [(float(second), count) for second, count in enumerate(tokens.tolist())]
    yield f"<div><h3>Running requests</h3>{over_time(running, end, 'requests')}</div>"
    yield f"<div><h3>Output tokens in each second</h3>{over_time(by_second, end, 'tokens/s')}</div>"
