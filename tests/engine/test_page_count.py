"""The page count from the compiler's analysis: the largest that stays within the limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_infer.engine.page_count import pages_that_fit
from llm_infer.errors import CapacityError


def program(weights: int, page: int, rest: int, copied: int, refuses_above: int) -> Callable[[int], int | None]:
    """A compiler's answers: `copied` of every page's bytes are held twice."""

    def measure(pages: int) -> int | None:
        total = weights + pages * (page + copied) + rest
        return None if total > refuses_above else total

    return measure


@given(
    weights=st.integers(0, 10_000),
    page=st.integers(1, 500),
    rest=st.integers(0, 3_000),
    copied_share=st.sampled_from([0, 0, 0.5, 1]),
    utilization=st.sampled_from([0.5, 0.9, 1.0]),
    most=st.integers(2, 400),
)
def test_the_program_stays_within_and_one_page_more_would_not(
    weights: int, page: int, rest: int, copied_share: float, utilization: float, most: int
) -> None:
    limit, copied = 20_000, int(page * copied_share)
    budget = int(limit * utilization)
    measure = program(weights, page, rest, copied, refuses_above=limit)
    best = min(most, (budget - weights - rest) // (page + copied))
    arguments = {"limit": limit, "utilization": utilization, "weights": weights, "page_bytes": page, "most": most}
    if best < 2:
        with pytest.raises(CapacityError, match="raise memory_utilization"):
            pages_that_fit(measure, **arguments)
        return
    try:
        pages = pages_that_fit(measure, **arguments)
    except CapacityError:
        assert copied or measure(min(most, (budget - weights) // page)) is None  # only then may it fall short
        return
    assert weights + pages * (page + copied) + rest <= budget
    if not copied and measure(min(most, (budget - weights) // page)) is not None:
        assert pages == best


def test_a_refused_program_is_tried_with_fewer_pages() -> None:
    asked = []

    def measure(pages: int) -> int | None:
        asked.append(pages)
        return None if pages > 80 else 100 + 10 * pages

    assert pages_that_fit(measure, limit=1000, utilization=1.0, weights=50, page_bytes=10, most=10**6) == 86
    assert asked == [95, 47]  # 90 would fit, if what is no page did not grow
