"""Small SVG plots: a histogram and a line over time, with axes that name their units. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 16, 40
BINS = 40


def histogram(values: np.ndarray, unit: str, count: str, marks: Mapping[str, float]) -> str:
    """Returns bars of how many values lie where, up to the 99th percentile: single large ones would hide the others.

    Args:
        values: at least one.
        unit: of the values; below the axis.
        count: what a bar counts; beside the axis.
        marks: names of values that get a vertical line.
    """
    top = float(np.percentile(values, 99)) or float(values.max()) or 1.0
    x_axis, right = _ticks(top)
    shown = values[values <= right]
    counts, edges = np.histogram(shown, BINS, (0, right))
    y_axis, high = _ticks(float(counts.max(initial=1)), whole=True)
    bars = [
        f'<rect class="bar" x="{_x(low, right):.1f}" y="{_y(n, high):.1f}" width="{(WIDTH - LEFT - RIGHT) / BINS - 1:.1f}" '
        f'height="{_y(0, high) - _y(n, high):.1f}"><title>{low:.4g} to {up:.4g} {unit}: {n} {count}</title></rect>'
        for n, low, up in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if n
    ]
    lines = [
        f'<line class="mark" x1="{_x(at, right):.1f}" x2="{_x(at, right):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{_x(at, right) + 3:.1f}" y="{TOP + 9}">{escape(name)}</text>'
        for name, at in marks.items()
        if at <= right
    ]
    beyond = len(values) - len(shown)
    label = f"{unit}; {beyond} more up to {values.max():,.4g}" if beyond else unit
    return _svg(bars + lines, x_axis, right, label, y_axis, high, count)


def over_time(points: Sequence[tuple[float, float]], end: float, label: str) -> str:
    """Returns a line of steps: each value holds until the next point.

    Args:
        points: times in seconds, and values from then on.
        end: where the axis ends, in seconds.
        label: what the values are, with their unit.
    """
    x_axis, right = _ticks(end or 1.0)
    y_axis, high = _ticks(max((value for _, value in points), default=1.0) or 1.0)
    path, before = [f"M{_x(0, right):.1f} {_y(0, high):.1f}"], 0.0
    for time, value in _thinned(points, right):
        if value != before:
            path.append(f"H{_x(time, right):.1f}V{_y(value, high):.1f}")
        before = value
    path.append(f"H{_x(end, right):.1f}")
    return _svg([f'<path class="line" d="{"".join(path)}"/>'], x_axis, right, "s since the start", y_axis, high, label)


def _thinned(points: Sequence[tuple[float, float]], right: float) -> Sequence[tuple[float, float]]:
    """Returns the highest point of each tenth of a pixel, or all where they are few: a page should stay small."""
    if len(points) <= 4 * WIDTH:
        return points
    highest: dict[int, tuple[float, float]] = {}
    for time, value in points:
        place = int(4 * _x(time, right))
        if place not in highest or value > highest[place][1]:
            highest[place] = (time, value)
    return list(highest.values())


def _ticks(top: float, *, whole: bool = False) -> tuple[list[float], float]:
    """Returns round numbers from 0 to the first that is not below `top`, at most seven, and that last one."""
    step = 10.0 ** math.floor(math.log10(top / 5)) if top > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor * 6 >= top)
    if whole:
        step = max(1.0, step)
    count = math.ceil(top / step - 1e-9)
    return [step * index for index in range(count + 1)], step * count


def _x(value: float, right: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / right


def _y(value: float, high: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / high


def _svg(
    content: list[str], x_axis: list[float], right: float, x_label: str, y_axis: list[float], high: float, y_label: str
) -> str:
    """Returns a plot with its axes."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for value in y_axis:
        y = _y(value, high)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.4g}</text>')
    for value in x_axis:
        x = _x(value, right)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:,.4g}</text>')
    parts += content
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y_label)}</text>'
    )
    return "".join([*parts, "</svg>"])
