"""What `bench peers` has found: the table of medians and ratios, and the record for a file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Row:
    """What was found of one engine.

    Attributes:
        samples: metric → tok/s of each round that has it.
        version: the engine's.
        precision: of weights, products and cache.
        missing: metric → why a round has no value of it.
        error: why it is left out, or None.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    version: str = ""
    precision: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def medians(self) -> dict[str, float]:
        """Returns the median of each metric that has values."""
        return {metric: statistics.median(values) for metric, values in self.samples.items() if values}

    def notes(self) -> list[str]:
        """Says in a line each why values are missing, or come from fewer rounds."""
        reasons: dict[str, list[str]] = {}
        for metric, why in self.missing.items():
            reasons.setdefault(why, []).append(metric)
        lines = [f"no {', '.join(metrics)}: {why}" for why, metrics in reasons.items()]
        return lines if self.error is None else [*lines, self.error]


def table(rows: Mapping[str, Row], metrics: Sequence[str], ours: Sequence[str]) -> str:
    """Returns medians in tok/s with their spread (half of largest − smallest), and our medians as multiples of each peer's.

    Args:
        rows: of each engine.
        metrics: the columns.
        ours: names of the rows that are compared with the others.
    """
    middle = {name: row.medians() for name, row in rows.items()}
    lines = [["engine", *metrics]]
    for name, row in rows.items():
        cells = (_cell(row.samples.get(metric, [])) for metric in metrics)
        lines.append([f"{name} {row.version}".strip(), *cells])
    for peer in (name for name in rows if name not in ours):
        for name in ours:
            both = middle[name].keys() & middle[peer].keys()
            cells = (f"{middle[name][m] / middle[peer][m]:.2f} ×" if m in both else "–" for m in metrics)
            lines.append([f"{name} / {peer}", *cells])
    first, width = max(len(line[0]) for line in lines), max(15, *map(len, metrics)) + 2
    shown = [f"{line[0]:<{first}}" + "".join(f"{cell:>{width}}" for cell in line[1:]) for line in lines]
    shown += [f"{name}: {row.precision}" for name, row in rows.items() if row.precision]
    shown += [f"{name}: {note}" for name, row in rows.items() for note in row.notes()]
    return "\n".join(shown)


def record(rows: Mapping[str, Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Returns all values of all rounds with versions, precisions, and why some are missing."""
    return {
        "versions": {name: row.version for name, row in rows.items() if row.version},
        "precisions": {name: row.precision for name, row in rows.items() if row.precision},
        "tok_s": {name: {metric: row.samples.get(metric, []) for metric in metrics} for name, row in rows.items()},
        "missing": {name: row.missing for name, row in rows.items() if row.missing},
        "errors": {name: row.error for name, row in rows.items() if row.error is not None},
    }


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ± {(max(values) - min(values)) / 2:.1f}" if values else "–"
