"""Figures of a load whose times are known, and when requests come."""

from __future__ import annotations

import numpy as np
import pytest

from llm_infer.bench.serving.client import Outcome
from llm_infer.bench.serving.figures import figures
from llm_infer.bench.serving.load import Arrivals, Load
from llm_infer.bench.serving.table import table


def known() -> Load:
    """Three answers and an error over four seconds, in another order than they were sent."""
    first = Outcome(100.0, 102.0, [100.5, 101.0, 102.0], 10, 3, 4)
    second = Outcome(100.5, 103.5, [101.5, 103.5], None, 5)
    one_token = Outcome(101.0, 101.25, [101.25], 2, 1)
    refused = Outcome(101.0, 101.1, error="HTTP 429", message="too much waits")
    outcomes = [(refused, 8), (one_token, 2), (first, 9), (second, 6)]
    return Load(started=100.0, ended=104.0, outcomes=outcomes, cpu=0.0018)


def test_figures_of_known_times() -> None:
    found = figures(known(), percentiles=(50, 99.9))
    assert (found["completed"], found["failed"], found["duration"]) == (3, 1, 4.0)
    assert (found["total_input_tokens"], found["total_output_tokens"], found["total_cached_tokens"]) == (18, 9, 4)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (
        0.75,
        2.25,
        6.75,
    )
    assert found["input_lens"] == [10, 6, 8, 2] and found["output_lens"] == [3, 5, 0, 1]
    assert found["ttfts"] == [0.5, 1.0, None, 0.25] and found["itls"] == [[0.5, 1.0], [2.0], [], []]
    assert found["e2els"] == [2.0, 3.0, None, 0.25] and found["start_times"] == [0.0, 0.5, 1.0, 1.0]
    assert found["mean_ttft_ms"] == pytest.approx(1750 / 3) and found["median_ttft_ms"] == 500
    assert found["mean_tpot_ms"] == pytest.approx((750 + 500) / 2) and found["std_tpot_ms"] == pytest.approx(125)
    assert found["p50_itl_ms"] == 1000 and found["p99.9_itl_ms"] == pytest.approx(1998)
    assert found["mean_e2el_ms"] == pytest.approx(1750)
    assert found["max_concurrent_requests"] == 4
    # Seconds hold 1 token of the first answer; another, 2.5 of the second and the single one; the third of the first; 2.5.
    assert found["max_output_tokens_per_s"] == pytest.approx(4.5)
    assert found["client_cpu_us_per_token"] == pytest.approx(200)
    assert found["errors"] == ["", "", "HTTP 429: too much waits", ""] and found["error_counts"] == {"HTTP 429": 1}
    assert found["request_goodput"] is None


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 500}, 2),
        ({"ttft": 500, "tpot": 749}, 1),
        ({"tpot": 750}, 3),
        ({"e2el": 2000, "ttft": 1000}, 2),
        ({"ttft": 0}, 0),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: dict[str, float], good: int) -> None:
    assert figures(known(), goodput=limits)["request_goodput"] == good / 4


def test_whole_answers_have_no_times_of_tokens_and_keep_no_limit_of_them() -> None:
    load = Load(started=0.0, ended=2.0, outcomes=[(Outcome(0.0, 1.5, [], 4, 6), 4)])
    found = figures(load, goodput={"ttft": 1e9})
    assert found["mean_e2el_ms"] == 1500 and found["mean_ttft_ms"] is None and found["p99_itl_ms"] is None
    assert found["request_goodput"] == 0 and found["max_output_tokens_per_s"] == 6


def test_nothing_at_all_has_figures() -> None:
    found = figures(Load())
    assert found["completed"] == 0 and found["max_concurrent_requests"] == 0 and found["mean_ttft_ms"] is None
    assert "interrupted" not in table(found, ["ttft"], (50,))


def test_the_table_has_a_unit_for_each_rate_and_errors_by_kind() -> None:
    load = known()
    load.interrupted = True
    text = table(figures(load, ["ttft"], (50, 99), {"ttft": 500}), ["ttft"], (50, 99))
    assert "0.75 requests/s" in text and "2.25 tokens/s" in text and "Latencies in ms" in text and "P99" in text
    assert "1 × HTTP 429, such as: too much waits" in text and "200.00 µs/token" in text
    assert text.startswith("interrupted") and "Inter-token" not in text


def test_gaps_have_the_asked_rate_and_burstiness() -> None:
    for burstiness in (0.5, 1.0, 4.0):
        times = Arrivals(rate=10.0, burstiness=burstiness).times(20_000, np.random.default_rng(0))
        gaps = np.diff(times)
        assert times[0] == 0 and gaps.mean() == pytest.approx(0.1, rel=0.03)
        assert gaps.var() == pytest.approx(0.01 / burstiness, rel=0.1)
    again = Arrivals(rate=10.0).times(5, np.random.default_rng(1))
    assert again.tolist() == Arrivals(rate=10.0).times(5, np.random.default_rng(1)).tolist()


def test_gaps_of_infinite_burstiness_are_all_the_same() -> None:
    times = Arrivals(rate=4.0, burstiness=float("inf")).times(5, np.random.default_rng(0))
    assert times.tolist() == [0, 0.25, 0.5, 0.75, 1.0]


def test_without_a_rate_all_come_at_once() -> None:
    assert Arrivals().times(3, np.random.default_rng(0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("ramp", "middle"), [("linear", 50.5), ("exponential", 10.0)])
def test_a_ramp_goes_from_one_rate_to_the_other(ramp: str, middle: float) -> None:
    arrivals = Arrivals(burstiness=1e6, ramp=ramp, ramp_start=1.0, ramp_end=100.0)  # next to no noise
    gaps = np.diff(arrivals.times(1001, np.random.default_rng(0)))
    assert 1 / gaps[0] == pytest.approx(1.0, rel=0.15)
    assert 1 / gaps[499] == pytest.approx(middle, rel=0.02) and 1 / gaps[-1] == pytest.approx(100, rel=0.02)
