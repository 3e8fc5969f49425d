"""numerics="invariant": which kernels it takes on a GPU, that they give a row the same bits (interpreted), and who is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of
from pallas_kernels.dispatch import Case
from pallas_kernels.grouped_matmul import gpu_triton as grouped
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.numerics import is_invariant, numerics
from pallas_kernels.paged_attention import gpu_triton as attention
from pallas_kernels.paged_attention.gpu_blocks import choose_blocks
from pallas_kernels.paged_attention.gpu_units import make_units
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.paged_attention.plan import AttentionPlan, PlanShape, fill_plan, plan_fields
from pallas_kernels.row_sums import KINDS, row_sums
from pallas_kernels.row_sums import gpu_triton as sums


def attention_case(**options: object) -> Case:
    shapes = {"q": (8, 8, 64), "k_new": (8, 2, 64), "pages": (1, 9, 2, 2, 64, 64)}
    plain = dict(q_block=8, window=None, softcap=None, sinks=False, kv_scales=False)
    return Case("gpu", "NVIDIA H100", shapes, dict.fromkeys(shapes, "bfloat16"), plain | options)


def test_the_setting_holds_inside_alone_and_programs_are_traced_again() -> None:
    traced = []
    step = jax.jit(lambda x: traced.append(is_invariant()) or x)
    for name in ("auto", "invariant", "auto", "invariant"):
        with numerics(name):
            step(1.0)
            assert case_of({"x": jnp.zeros(3)}).options.get("invariant", False) == (name == "invariant")
    assert traced == [False, True] and not is_invariant()


def test_on_a_gpu_only_kernels_of_a_fixed_order_are_taken() -> None:
    assert dispatch.choose("paged_attention", attention_case(invariant=True)).name == "gpu_triton"
    x = {"x": (5, 640)}
    for invariant, chosen in ((True, "gpu_triton"), (False, "xla")):
        case = Case("gpu", "NVIDIA H100", x, {"x": "float32"}, {"kind": "squares", "invariant": invariant})
        assert dispatch.choose("row_sums", case).name == chosen
    for op in ("row_sums", "grouped_matmul", "paged_attention"):  # a card that Triton does not know
        case = attention_case(invariant=True, kind="squares")
        old = Case("gpu", "Tesla V100", case.shapes, case.dtypes, case.options)
        with pytest.raises(ValueError, match="which numerics='invariant' does not allow") as error:
            dispatch.choose(op, old)
        assert op != "paged_attention" or "in other parts than a prefill" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_row_sums(kind: str) -> None:
    rng = np.random.default_rng(0)
    for features in (1, 40, 1024, 2500):
        x = jnp.asarray(rng.standard_normal((7, features)), jnp.float32)
        shift = jnp.asarray(rng.standard_normal(7), jnp.float32)
        call = jax.jit(functools.partial(sums.row_sums, kind=kind, interpret=True))
        found = np.asarray(call(x, shift))
        np.testing.assert_allclose(found, row_sums(x, shift, kind=kind, implementation="xla"), rtol=2e-5, atol=2e-4)
        np.testing.assert_array_equal(call(x[2:3], shift[2:3]), found[2:3])


def test_interpreted_products_have_the_same_bits_with_any_number_of_rows() -> None:
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rng.standard_normal((150, 300)), dtype)
        weights = jnp.asarray(rng.standard_normal((2, 90, 300)), dtype)

        @functools.partial(jax.jit, static_argnames="dtype")
        def product(x: jax.Array, dtype: str, weights: jax.Array = weights) -> jax.Array:
            sizes = jnp.full((1,), x.shape[0], jnp.int32)
            return grouped.grouped_matmul(x, weights, sizes, jnp.int32(1), dtype=dtype, interpret=True)

        expected = np.asarray(x, np.float32) @ np.asarray(weights[1], np.float32).T
        for result in ("bfloat16", "float32"):
            found = product(x, result)
            assert found.dtype == result
            close = 2e-2 if "bfloat16" in (result, found.dtype.name) else 1e-4
            np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=close, atol=close * 30)


def test_the_result_of_grouped_products_has_the_type_asked_for_and_gradients() -> None:
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((4, 8), (1, 6, 8)))
    sizes = jnp.array([4], jnp.int32)
    for implementation in ("ragged", "reference"):
        product = functools.partial(grouped_matmul, implementation=implementation, dtype=jnp.float32)
        assert product(x, weights, sizes).dtype == jnp.float32
        to_x, to_weights = jax.grad(lambda x, w, p=product: jnp.sum(p(x, w, sizes) ** 2), (0, 1))(x, weights)
        wide = [jnp.asarray(each, jnp.float32) for each in (x, weights)]
        expected = jax.grad(lambda x, w: jnp.sum((x @ w[0].T) ** 2), (0, 1))(*wide)
        for found, other in zip((to_x, to_weights), expected, strict=True):
            assert found.dtype == jnp.bfloat16
            np.testing.assert_allclose(np.asarray(found, np.float32), other, rtol=0.05, atol=0.3)


PAGE, HEADS, KV_HEADS, DIM = 16, 4, 2, 64


def plan_of(rows: int, context: int, buckets: int) -> AttentionPlan:
    shape = PlanShape(buckets, min(buckets, 4), 16, min(buckets, 32))
    out = {name: np.zeros(dims, np.int32) for name, dims in plan_fields(shape).items()}
    tables = 1 + np.arange(16, dtype=np.int32)[None]
    fill_plan(shape, out, [rows], [context], tables, PAGE)
    return AttentionPlan(**{name: jnp.asarray(value) for name, value in out.items()})


@pytest.mark.parametrize("window", [None, 37, 90])
def test_interpreted_attention_gives_a_token_alone_what_a_prompt_gives_it(window: int | None) -> None:
    """To a last bit: the interpreter's products of a tile depend on where in it a row is. `bench gpu` compares bits."""
    length, rng = 130, np.random.default_rng(0)
    q = rng.standard_normal((length, HEADS, DIM)).astype(np.float32)
    k, v = (rng.standard_normal((length, KV_HEADS, DIM)).astype(np.float32) for _ in range(2))

    @jax.jit
    def attend(q, k, v, pages, plan):
        call = by_keyword(attention.paged_attention)
        return call(q, k, v, pages, plan, scale=0.125, layer=0, window=window, interpret=True)

    def run(pages: jax.Array, first: int, last: int, bucket: int) -> tuple[np.ndarray, jax.Array]:
        rows = last - first
        inputs = (np.concatenate([x[first:last], np.zeros((bucket - rows, *x.shape[1:]), x.dtype)]) for x in (q, k, v))
        with numerics("invariant"):
            out, pages = attend(*inputs, pages, plan_of(rows, last, bucket))
        return np.asarray(out)[:rows], pages

    empty = jnp.zeros((1, 20, 2, KV_HEADS, PAGE, DIM), jnp.float32)
    whole, pages = run(empty, 0, length, 160)
    for first, last, bucket in ((129, 130, 2), (100, 130, 32), (64, 65, 2), (77, 130, 64)):
        np.testing.assert_allclose(run(pages, first, last, bucket)[0], whole[first:last], rtol=1e-4, atol=1e-6)


def test_runs_of_keys_begin_where_those_of_any_other_step_do() -> None:
    for context in (40, 129, 200):
        for align, begins in ((64, 4), (1, 1)):
            plan = plan_of(1, context, 2)
            more = dict(page_size=PAGE, group=2, tile=16, split_keys=1 << 30, max_splits=1, window=37)
            units = make_units(plan, align_keys=align, **more)
            begin = int(units.units[0, 5])
            oldest = max(context - 37, 0) // PAGE
            assert begin == oldest // begins * begins and int(units.units[0, 6]) == -(-context // PAGE)


def test_blocks_of_attention_follow_from_the_model_alone() -> None:
    sizes = dict(num_kv_heads=2, group=4, head_dim=64, page_size=16, item_bytes=2)
    with numerics("invariant"):
        chosen = {choose_blocks(plan_of(1, 5, bucket), "NVIDIA H100", "bfloat16", **sizes) for bucket in (2, 64, 512)}
    assert len(chosen) == 1 and chosen.pop().max_splits == 1
    free = {choose_blocks(plan_of(1, 5, bucket), "NVIDIA H100", "bfloat16", **sizes) for bucket in (2, 64, 512)}
    assert len(free) > 1
