"""States of recurrent models on the host: what forks share, what prefixes go on from, what is given up when pages are short."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_infer.kvcache.page_allocator import InvariantError
from llm_infer.kvcache.states import States
from tests.host.fake_device import FakeEngine

SIZE = 4


def engine(**options: int | bool) -> FakeEngine:
    return FakeEngine(**({"num_states": 60, "page_size": SIZE, "num_pages": 60} | options))


def test_a_prompt_that_came_before_goes_on_from_its_last_full_page() -> None:
    made = engine()
    prompt = [1, 2, 0] * 5
    for cached in (0, 12, 12):  # 15 tokens: three full pages, and the last tokens are computed
        request = made.add(prompt, max_tokens=3)
        made.run()
        assert request.num_cached_tokens == cached
        made.verify(request)
    longer = made.add([*prompt[:11], 4, 4, 4, 4, 4, 4], max_tokens=3)
    made.run()
    assert longer.num_cached_tokens == 0  # pages of 8 tokens are known, but no state behind them


def test_an_answer_leaves_one_state_behind_its_last_full_page() -> None:
    made = engine()
    request = made.add([1, 2, 0], max_tokens=20)
    made.run()
    states = made.scheduler.books.states
    assert states is not None and len(states.pages(0)) == 1  # the prompt has no full page
    follow = made.add([*request.sequences[0].tokens, 5], max_tokens=2)
    made.run()
    assert follow.num_cached_tokens == 20  # 23 tokens are there, 22 of them computed
    made.verify(follow)


def test_samples_fork_the_state_before_the_last_token_and_compute_nothing_else() -> None:
    made = engine(max_num_seqs=4)
    request = made.add([1, 2, 0] * 4, n=4, max_tokens=5)
    made.run()
    made.verify(request)
    computed = [row for plan in made.plans for rows in plan.rows for row in rows if row.start < 12]
    assert [
        (row.sequence.sample_index, row.start, row.count) for row in computed if row.sequence.sample_index == 0
    ] == [
        (0, 0, 8),
        (0, 8, 3),
        (0, 11, 1),
    ]
    assert [(row.start, row.count) for row in computed if row.sequence.sample_index] == [(11, 1)] * 3
    assert len({row.state_from for row in computed if row.start == 11}) == 1


def test_without_a_prefix_cache_states_stay_where_they_are() -> None:
    made = engine(enable_prefix_caching=False, num_states=2 * 4 + 1)
    request = made.add([1, 2, 0] * 5, max_tokens=9)
    made.run()
    made.verify(request)
    rows = [row for plan in made.plans for each in plan.rows for row in each]
    assert {row.state_to for row in rows} == {rows[0].state_to} and rows[0].count == 15


def test_accepted_proposals_are_computed_again() -> None:
    made = engine(num_drafts=3, max_model_len=64)
    request = made.add([1, 2, 3, 1, 2, 3, 1, 2], max_tokens=40)
    made.run()
    made.verify(request)
    speculator = made.scheduler.speculator
    assert speculator is not None and speculator.num_accepted > 0


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 30), st.sampled_from([None, "a", "b"]), st.integers(1, 3)),
        min_size=2,
        max_size=8,
    ),
    spare=st.integers(0, 12),
    drafts=st.sampled_from([0, 2]),
)
def test_a_state_of_another_prefix_is_never_gone_on_from(
    requests: list[tuple[int, int, str | None, int]], spare: int, drafts: int
) -> None:
    """FakeDevice checks what each state has taken in; salts part equal prompts from each other."""
    made = engine(num_states=2 * 3 + 1 + spare, max_num_seqs=3, num_drafts=drafts, num_pages=80)
    seen = set()
    for kind, length, salt, n in requests:
        prompt = [(kind * position) % 5 for position in range(length)]
        request = made.add(prompt, cache_salt=salt, n=n, max_tokens=6)
        made.run()
        made.verify(request)
        assert salt in seen or request.num_cached_tokens == 0, "nobody with this salt came before"
        seen.add(salt)


def test_books_of_snapshots() -> None:
    states = States(4, 2)
    first, second = states.allocator.allocate(1, 2)
    states.insert(1, b"a", first)
    states.insert(1, b"a", second)  # known: no effect
    assert states.longest(1, [b"x", b"a", b"b"]) == 2 and states.longest(0, [b"a"]) == 0
    states.allocator.release(1, (first, second))
    assert states.adopt(1, b"a") == first and states.pages(1) == [first]
    states.drop(1, b"b")
    states.allocator.release(1, (first,))
    states.allocator.check([[[]], [states.pages(1)]])
    assert len(states.allocator.allocate(1, 3)) == 3 and states.longest(1, [b"a"]) == 0  # the snapshot had to go
    states._digest_of[1][3] = b"?"
    with pytest.raises(InvariantError, match="disagree"):
        states.pages(1)
