"""The paged-attention paper's picture: pages are nearly full, contiguous reservations are not, sharing saves."""

from __future__ import annotations

import pytest

from llm_infer.bench.simulate import SHAREGPT, BuddyAllocator, memory_use, sharing, table


def test_lengths_have_the_stated_means() -> None:
    pairs = SHAREGPT.draw(4000, 0)
    assert sum(prompt for prompt, _ in pairs) / 4000 == pytest.approx(161, rel=0.03)
    assert sum(output for _, output in pairs) / 4000 == pytest.approx(338, rel=0.03)


def test_pages_hold_tokens_where_contiguous_blocks_do_not() -> None:
    print("\n" + table())
    maximum, power_of_two, oracle, paged = memory_use(300)
    assert paged.of_reserved >= 96
    for row, limit in ((maximum, 50), (power_of_two, 50), (oracle, 60)):
        assert row.of_memory <= row.of_reserved < limit
    assert paged.sequences > 2 * oracle.sequences


@pytest.mark.parametrize("n", [2, 4, 6])
def test_parallel_samples_save_what_the_closed_form_says(n: int) -> None:
    row = sharing(n, paper=0)
    assert row.measured == pytest.approx(row.closed_form, abs=1)
    assert row.measured > 2


def test_buddies_merge_again() -> None:
    memory = BuddyAllocator(16)
    blocks = [memory.allocate(size) for size in (3, 4, 5)]
    assert blocks == [(0, 4), (4, 4), (8, 8)]
    assert memory.allocate(1) is None
    for block in blocks:
        assert block is not None
        memory.release(*block)
    assert memory.allocate(16) == (0, 16)
