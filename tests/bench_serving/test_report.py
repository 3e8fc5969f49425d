"""The page: well-formed, complete, and nothing in it is fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from llm_infer.bench.serving.client import Outcome
from llm_infer.bench.serving.figures import METRICS, figures
from llm_infer.bench.serving.load import Load
from llm_infer.bench.serving.plots import _ticks, histogram, over_time
from llm_infer.bench.serving.report import page

VOID = {"meta"}
SETTINGS = {
    "model_id": "<b>m</b>",
    "base_url": "http://h",
    "endpoint": "/v1/completions",
    "date": "now",
    "extra_body": {},
}


class Checked(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(html: str) -> Checked:
    """A page or a plot, parsed."""
    found = Checked()
    found.feed(html)
    found.close()
    assert not found.open
    return found


def shown(load: Load) -> Checked:
    """The page of a load, parsed and checked to load nothing."""
    metrics, percentiles = tuple(METRICS), (50.0, 99.0)
    html = page(load, figures(load, metrics, percentiles), SETTINGS, metrics, percentiles)
    found = checked(html)
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "srcset", "data", "action", "xlink:href", "style", "onload"}
    assert not {"script", "link", "img", "iframe", "object"} & set(found.names)
    assert not re.search(r"url\(|@import", html)
    return found


def test_a_page_has_plots_figures_errors_and_settings() -> None:
    outcomes = [(Outcome(i / 10, i / 10 + 1, [i / 10 + 0.2, i / 10 + 0.5, i / 10 + 0.9], 5, 3), 5) for i in range(30)]
    outcomes.append((Outcome(1.0, 1.1, error="HTTP 429", message="<script>alert(1)</script>"), 5))
    found = shown(Load(0.0, 4.0, outcomes, interrupted=True))
    assert found.names.count("svg") == 5
    for said in (
        "Time to first token",
        "Interrupted",
        "HTTP 429",
        "<script>alert(1)</script>",
        "<b>m</b>",
        "tokens/s",
        " ms",
    ):
        assert said in found.text, said
    assert "extra_body" not in found.text


@pytest.mark.parametrize(
    "outcomes",
    [[], [(Outcome(0.0, 1.0, [], 3, 3), 3)], [(Outcome(0.0, 0.0, [0.0], 1, 1), 1)], [(Outcome(0, 1, error="x"), 1)]],
)
def test_a_page_of_hardly_anything_is_well_formed(outcomes: list[tuple[Outcome, int | None]]) -> None:
    shown(Load(0.0, 1.0, outcomes))


@pytest.mark.parametrize("top", [1e-4, 0.3, 1, 7, 59.9, 60, 61, 1e6])
def test_an_axis_has_few_round_numbers_and_holds_everything(top: float) -> None:
    ticks, last = _ticks(top)
    assert 3 <= len(ticks) <= 7 and ticks[0] == 0 and last >= top * (1 - 1e-9) and last == pytest.approx(ticks[-1])


def test_a_histogram_counts_every_value_or_says_how_many_lie_beyond() -> None:
    values = np.array([*np.linspace(1, 100, 995), *[10_000.0] * 5])
    plot = histogram(values, "ms", "requests", {"P50": 50.0})
    counted = sum(int(each) for each in re.findall(r": (\d+) requests</title>", plot))
    assert counted == 995 and "5 more up to" in plot and ">P50<" in plot
    checked(plot)


def test_a_long_line_stays_small() -> None:
    points = [(index / 1e4, float(index % 50)) for index in range(100_000)]
    plot = over_time(points, 10.0, "requests")
    assert len(plot) < 100_000
    checked(plot)
