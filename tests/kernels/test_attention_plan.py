"""The attention work list: every row once, every visible page in its item's run, and never more items than N."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import device_plan
from pallas_kernels.paged_attention import plan as plan_module
from pallas_kernels.paged_attention.decode_plan import decode_plan
from pallas_kernels.paged_attention.plan import AttentionPlan, PlanShape, check_plan, fill_plan, plan_fields


def make_plan(shape, q_len, kv_len, tables, page_size, window=None, prefilled=False):
    out = {name: np.full(dims, -7, np.int32) for name, dims in plan_fields(shape).items()}
    if prefilled:
        out["block_tables"][:] = 0
        for row, table in enumerate(tables):
            out["block_tables"][row, : len(table)] = table
        tables = out["block_tables"]
    fill_plan(shape, out, q_len, kv_len, tables, page_size, window)
    return AttentionPlan(**out)


@st.composite
def steps(draw):
    page_size = draw(st.sampled_from([1, 4, 16]))
    lengths = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 70)), max_size=7))
    if draw(st.booleans()):  # plain decode has a path of its own
        lengths = [(1, context) for _, context in lengths]
    q_len, kv_len = [q for q, _ in lengths], [q + context for q, context in lengths]
    shape = PlanShape(
        tokens=max(1, sum(q_len) + draw(st.integers(0, 5))),
        sequences=max(1, len(lengths) + draw(st.integers(0, 2))),
        pages_per_seq=max(1, -(-max(kv_len, default=0) // page_size) + draw(st.integers(0, 2))),
        q_block=draw(st.integers(1, 40)),
    )
    next_page, tables = 1, []
    for n in kv_len:
        count = -(-n // page_size)
        tables.append(list(range(next_page, next_page + count)))
        next_page += count
    window = draw(st.none() | st.integers(1, 80))
    return shape, q_len, kv_len, tables, page_size, window, draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(steps())
def test_items_cover_each_row_and_its_visible_pages_once(step):
    shape, q_len, kv_len, tables, page_size, window, prefilled = step
    plan = make_plan(shape, q_len, kv_len, tables, page_size, window, prefilled)
    num_single, num_items = plan.counts.tolist()
    assert plan.q_block == shape.q_rows <= shape.q_block
    assert num_single <= num_items <= shape.num_items == plan.items.shape[0]
    assert not plan.items[num_items:].any()
    assert (plan.items[:num_single, 2] == 1).all() and (plan.items[num_single:num_items, 2] > 1).all()

    seen_rows = []
    for seq, first_row, rows, first_page, page_count in plan.items[:num_items].tolist():
        assert 1 <= rows <= shape.q_rows
        assert plan.q_start[seq] <= first_row and first_row + rows <= plan.q_start[seq + 1]
        needed = set()
        for row in range(first_row, first_row + rows):
            position = int(plan.kv_len[seq] - (plan.q_start[seq + 1] - plan.q_start[seq]) + row - plan.q_start[seq])
            seen_rows.append(row)
            table = tables[seq]
            assert plan.write_slot[row] == table[position // page_size] * page_size + position % page_size
            oldest = 0 if window is None else max(0, position - window + 1)
            needed.update(range(oldest // page_size, position // page_size + 1))
        assert needed == set(range(first_page, first_page + page_count))  # all that is visible, and nothing more
    assert sorted(seen_rows) == list(range(sum(q_len)))
    assert not plan.write_slot[sum(q_len) :].any()

    n = len(q_len)
    assert np.diff(plan.q_start).tolist() == q_len + [0] * (shape.sequences - n)
    assert plan.kv_len.tolist() == kv_len + [0] * (shape.sequences - n)
    for row, table in enumerate(tables + [[]] * (shape.sequences - n)):
        assert plan.block_tables[row].tolist() == table + [0] * (shape.pages_per_seq - len(table))


@given(st.integers(1, 300), st.integers(1, 300), st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_item_bound_holds(tokens, q_block, rows):
    rows = [r for r, end in zip(rows, np.cumsum(rows), strict=True) if end <= tokens]
    shape = PlanShape(tokens, max(1, len(rows)), 1, q_block)
    assert sum(-(-r // shape.q_rows) for r in rows) <= shape.num_items


def test_table_inputs_agree():
    """Lists, a 2-D array of another width and the filled view itself give the same plan."""
    shape = PlanShape(8, 3, 6, 4)
    tables = [[3, 4, 5], [9]]
    as_array = np.zeros((2, 9), np.int64)
    as_array[0, :3], as_array[1, :1] = tables
    plans = [
        make_plan(shape, [5, 1], [40, 16], tables, 16),
        make_plan(shape, np.array([5, 1]), np.array([40, 16]), as_array, 16),
        make_plan(shape, [5, 1], [40, 16], tables, 16, prefilled=True),
    ]
    for plan in plans[1:]:
        for name, expected in plans[0]._asdict().items():
            np.testing.assert_array_equal(plan._asdict()[name], expected, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(q_len=[9], kv_len=[9], tables=[[1]]), "9 tokens in a plan for 8"),
        (dict(q_len=[1] * 4, kv_len=[1] * 4, tables=[[1]] * 4), "4 sequences in a plan for 3"),
        (dict(q_len=[1], kv_len=[97], tables=[[1] * 6]), "97 tokens does not fit 6 pages of 16"),
        (dict(q_len=[1], kv_len=[9], tables=[[1] * 7]), "block table of 7 pages in a plan for 6"),
        (dict(q_len=[3], kv_len=[2], tables=[[1]]), "0 <= q_len <= kv_len"),
        (dict(q_len=[1, 1], kv_len=[2], tables=[[1]]), "q_len has 2 sequences, kv_len 1"),
        (dict(q_len=[1, 2], kv_len=[9, 17], tables=[[1], [2]]), r"row 2 \(sequence 1, position 16\).*null page"),
        (dict(q_len=[1], kv_len=[9], tables=[[1]], window=0), "window is 0"),
    ],
)
def test_bad_steps_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(PlanShape(8, 3, 6, 4), page_size=16, **arguments)


def test_plan_needs_no_jax():
    """The planner's file imports numpy only (the package around it imports jax)."""
    code = f"import runpy, sys; runpy.run_path({str(Path(plan_module.__file__))!r}); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([1, 4, 16]),
)
def test_a_later_decode_step_has_the_plan_that_the_host_would_make(sequences, page_size):
    shape = PlanShape(tokens=7, sequences=7, pages_per_seq=40, q_block=7)
    tables = [list(range(1 + 40 * i, 41 + 40 * i)) for i in range(len(sequences))]
    now = np.array([length for length, _, _ in sequences])
    later = now + [steps for _, steps, _ in sequences]
    active = np.array([goes_on for *_, goes_on in sequences])
    ones, padding = np.ones(len(sequences), int), np.zeros(7 - len(sequences), int)
    first = make_plan(shape, ones, now, tables, page_size)
    found = decode_plan(
        AttentionPlan(*map(jnp.asarray, first)),
        jnp.asarray(np.concatenate([later - 1, padding]), jnp.int32),
        jnp.asarray(np.concatenate([active, padding > 0])),
        page_size,
    )
    expected = make_plan(shape, ones, np.where(active, later, 1), tables, page_size)
    expected.write_slot[: len(sequences)][~active] = 0
    for name, array in expected._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)


DEVICE_PLAN = jax.jit(device_plan, static_argnames=("tokens_per_seq", "page_size", "q_block"))


@st.composite
def device_steps(draw):
    """Few shapes, so that few programs are compiled, and any lengths."""
    tokens_per_seq, q_block, page_size = draw(
        st.sampled_from([(1, 5, 4), (1, 1, 16), (3, 8, 4), (4, 1, 1), (9, 4, 4), (9, 64, 16), (20, 7, 16)])
    )
    sequences, width = 5, 70 // page_size + 1
    some = st.integers(0, tokens_per_seq) | st.sampled_from([0, 1, tokens_per_seq])
    counts = draw(st.lists(some, min_size=sequences, max_size=sequences))
    lengths = [draw(st.integers(count, 70)) for count in counts]
    tables = 1 + np.arange(sequences * width, dtype=np.int32).reshape(sequences, width)
    tables[np.arange(width)[None] >= -(-np.array(lengths)[:, None] // page_size)] = 0
    return counts, lengths, tables, dict(tokens_per_seq=tokens_per_seq, page_size=page_size, q_block=q_block)


@settings(max_examples=100, deadline=None)
@given(device_steps())
def test_the_device_makes_the_plan_of_the_host(step):
    counts, lengths, tables, sizes = step
    shape = PlanShape(len(counts) * sizes["tokens_per_seq"], len(counts), tables.shape[1], sizes["q_block"])
    found = DEVICE_PLAN(jnp.asarray(counts, jnp.int32), jnp.asarray(lengths, jnp.int32), tables, **sizes)
    expected = make_plan(shape, counts, lengths, tables, sizes["page_size"])
    for name, array in expected._asdict().items():
        assert getattr(found, name).dtype == jnp.int32
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)


def test_a_loop_on_the_device_plans_its_steps():
    tables = 1 + np.arange(12, dtype=np.int32).reshape(3, 4)
    sizes = dict(tokens_per_seq=2, page_size=4, q_block=2)

    def step(lengths, counts):
        lengths = lengths + counts
        return lengths, device_plan(counts, lengths, jnp.asarray(tables), **sizes)

    every = np.array([[2, 0, 1], [1, 1, 1], [0, 2, 2]], np.int32)
    _, found = jax.jit(lambda counts: jax.lax.scan(step, jnp.array([3, 0, 5], jnp.int32), counts))(every)
    lengths = np.array([3, 0, 5])
    for number, counts in enumerate(every):
        lengths = lengths + counts
        expected = make_plan(PlanShape(6, 3, 4, 2), counts, lengths, tables, 4)
        for name, array in expected._asdict().items():
            np.testing.assert_array_equal(getattr(found, name)[number], array, err_msg=name)


def test_rows_past_a_table_go_to_the_null_page():
    tables = jnp.array([[1, 2], [3, 4], [5, 0]], jnp.int32)
    counts, lengths = jnp.array([3, 1, 2], jnp.int32), jnp.array([9, 40, 6], jnp.int32)
    plan = DEVICE_PLAN(counts, lengths, tables, tokens_per_seq=3, page_size=4, q_block=2)
    slots = np.asarray(plan.write_slot)
    assert slots[:4].tolist() == [2 * 4 + 2, 2 * 4 + 3, 0, 0] and (slots[4:6] < 4).all() and not slots[6:].any()
    check_plan(plan._replace(kv_len=jnp.minimum(lengths, 8)), num_pages=6, page_size=4)
    for changes, message in (
        (dict(counts=counts[:2]), r"counts: expected int32 of shape \[S=3\]"),
        (dict(tables=tables[0]), r"tables: expected int32 of shape \[S, B\]"),
    ):
        arguments = dict(counts=counts, lengths=lengths, tables=tables) | changes
        with pytest.raises(ValueError, match=message):
            device_plan(**arguments, tokens_per_seq=3, page_size=4, q_block=2)
