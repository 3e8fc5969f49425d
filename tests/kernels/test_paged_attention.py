"""Ragged paged attention and page copies: every implementation against the reference, and no copy of the pool."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.paged_attention import (
    AttentionPlan,
    PlanShape,
    copy_pages,
    kv_pool_dtype,
    kv_pool_shape,
    paged_attention,
    plan_fields,
)
from pallas_kernels.paged_attention.cases import CASES, GQA3, MIXED, TINY_BUCKET, AttentionCase, Inputs, build

STATIC = ("scale", "softcap", "implementation")


@functools.cache
def jitted(implementation: str, window_is_static: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    # The reference is compiled without optimisation: that takes a third of the time, and it runs only once per case.
    options = {"xla_backend_optimization_level": 0} if implementation == "reference" else {}
    names = (*STATIC, "window") if window_is_static else STATIC
    return jax.jit(paged_attention, static_argnames=names, compiler_options=options)


@functools.cache
def inputs_of(name: str) -> Inputs:
    return build(CASES[name])


def run(inputs: Inputs, implementation: str) -> tuple[np.ndarray, np.ndarray]:
    options = dict(inputs.options)
    traced = "window" in options and inputs.q.shape[0] == GQA3.tokens  # these share programs; others give a Python int
    if traced:
        options["window"] = jnp.int32(options["window"])
    out, pages = jitted(implementation, window_is_static=not traced)(
        inputs.q,
        inputs.k_new,
        inputs.v_new,
        inputs.pages,
        inputs.plan,
        scale=inputs.scale,
        implementation=implementation,
        **options,
        **inputs.arrays,
    )
    return np.asarray(out), np.asarray(pages)


@functools.cache
def answer(name: str, implementation: str) -> tuple[np.ndarray, np.ndarray]:
    return run(inputs_of(name), implementation)


def textbook(case: AttentionCase, inputs: Inputs) -> np.ndarray:
    """Softmax attention in float64 from the sequences' plain K and V: no pages, no plan."""
    rows = []
    group = case.sizes.num_heads // case.sizes.num_kv_heads
    scales = case.kv_scales or (1.0, 1.0)
    for (q_len, kv_len), kv in zip(case.batch, inputs.history, strict=True):
        first = kv_len - q_len
        k, v = (np.repeat(kv[i] * np.float32(scales[i]).astype(float), group, axis=1) for i in range(2))
        for i in range(q_len):
            end, window = first + i + 1, case.options.get("window")
            begin = 0 if window is None else max(0, end - window)
            scores = np.einsum("hd,khd->hk", inputs.q[len(rows)].astype(np.float64), k[begin:end]) * inputs.scale
            if "softcap" in case.options:
                scores = case.options["softcap"] * np.tanh(scores / case.options["softcap"])
            weights = np.exp(scores)
            sink = np.exp(inputs.arrays["sinks"].astype(np.float64)) if case.sinks else 0.0
            rows.append(np.einsum("hk,khd->hd", weights / (weights.sum(-1) + sink)[:, None], v[begin:end]))
    return np.array(rows).reshape(-1, *inputs.q.shape[1:])


def num_rows(case: AttentionCase) -> int:
    return sum(q_len for q_len, _ in case.batch)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_textbook(name):
    case, inputs = CASES[name], inputs_of(name)
    out, _ = answer(name, "reference")
    tolerance = 1e-2 if case.sizes.dtype == "bfloat16" else 2e-5
    expected = textbook(case, inputs)
    np.testing.assert_allclose(out[: len(expected)].astype(np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["xla"])
@pytest.mark.parametrize("name", CASES)
def test_implementation_matches_the_reference(name, implementation):
    case, inputs = CASES[name], inputs_of(name)
    expected, expected_pages = answer(name, "reference")
    out, pages = answer(name, implementation)
    rows = num_rows(case)
    assert out.dtype == inputs.q.dtype and pages.dtype == inputs.pages.dtype
    tolerance = 1e-2 if case.sizes.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(
        out[:rows].astype(np.float32), expected[:rows].astype(np.float32), rtol=tolerance, atol=tolerance
    )
    assert np.isfinite(out.astype(np.float32)).all()
    # What was written is equal to the last bit, and nothing else changed (the null page may have).
    as_bytes = f"u{pages.dtype.itemsize}"
    np.testing.assert_array_equal(pages[:, 1:].view(as_bytes), expected_pages[:, 1:].view(as_bytes))
    np.testing.assert_array_equal(pages[0].view(as_bytes), inputs.pages[0].view(as_bytes))


@pytest.mark.parametrize("implementation", ["xla"])
def test_a_row_does_not_depend_on_its_batch(implementation):
    """Bitwise, among neighbours in its bucket, alone, on other pages, and (for decode) in another token bucket."""
    mixed, _ = answer("mixed", implementation)
    alone, _ = run(build(AttentionCase(GQA3, MIXED[:1]), seed=0), implementation)
    tiny, _ = answer("tiny_bucket_decode", implementation)
    assert MIXED[0] == CASES["tiny_bucket_decode"].batch[0] and CASES["tiny_bucket_decode"].sizes == TINY_BUCKET
    np.testing.assert_array_equal(alone[0], mixed[0])
    np.testing.assert_array_equal(tiny[0], mixed[0])

    chunk = len(MIXED) - 1  # the last sequence, a prefill chunk
    others_idle = tuple((0, 0) if i != chunk else lengths for i, lengths in enumerate(MIXED))
    alone, _ = run(build(AttentionCase(GQA3, others_idle)), implementation)
    rows = MIXED[chunk][0]
    np.testing.assert_array_equal(alone[:rows], mixed[num_rows(CASES["mixed"]) - rows :][:rows])


def program_arguments(dtype, layers=4, num_pages=256, tokens=8):
    """Shapes of a step over all layers: (pool, q per layer, k and v per layer, plan)."""
    shape = PlanShape(tokens, 4, 64, 4)
    pool = kv_pool_shape(
        "cpu", num_layers=layers, num_pages=num_pages, page_size=64, num_kv_heads=2, head_dim=64, dtype=dtype
    )
    array = jax.ShapeDtypeStruct
    plan = AttentionPlan(**{name: array(dims, jnp.int32) for name, dims in plan_fields(shape).items()})
    kv = array((tokens, 2, 64), jnp.float32)
    return array(pool, kv_pool_dtype("cpu", dtype)), array((tokens, 6, 64), jnp.float32), kv, plan


def check_in_place(compiled, pool) -> None:
    pool_bytes = int(np.prod(pool.shape)) * pool.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 50


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_scan_does_not_copy_the_pool(dtype):
    pool, q, kv, plan = program_arguments(dtype)

    def step(pages, q, kv, plan):
        def layer_step(carry, layer):
            x, pages = carry
            out, pages = paged_attention(x, kv, kv, pages, plan, layer=layer, scale=0.125, implementation="xla")
            return (out, pages), None

        (out, pages), _ = lax.scan(layer_step, (q, pages), jnp.arange(pages.shape[0], dtype=jnp.int32))
        return out, pages

    check_in_place(jax.jit(step, donate_argnums=0).lower(pool, q, kv, plan).compile(), pool)


def test_runs_under_shard_map():
    """Heads over `tp`, batch and pages over `dp`: all loop carries keep their types (one device, tracing is enough)."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("dp", "tp"))
    spec, inputs = PartitionSpec, inputs_of("everything")
    heads = spec("dp", "tp")
    sharded = jax.shard_map(
        lambda q, k, v, pages, plan, sinks, arrays: paged_attention(
            q, k, v, pages, plan, sinks=sinks, scale=inputs.scale, **arrays, **inputs.options
        ),
        mesh=mesh,
        in_specs=(heads, heads, heads, spec(None, "dp", None, "tp"), spec("dp"), spec("tp"), spec()),
        out_specs=(heads, spec(None, "dp", None, "tp")),
    )
    replicated = dict(inputs.arrays)
    sinks = replicated.pop("sinks")
    out, _ = jax.eval_shape(sharded, inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan, sinks, replicated)
    assert out.shape == inputs.q.shape


def test_copy_pages():
    pool = np.arange(2 * 6 * 3, dtype=np.float32).reshape(2, 6, 3)
    expected = pool.copy()
    expected[:, 4], expected[:, 5] = pool[:, 1], pool[:, 2]
    src, dst = jnp.array([1, 2, 3], jnp.int32), jnp.array([4, 5, 0], jnp.int32)
    copied = jax.jit(copy_pages, donate_argnums=0)(jnp.asarray(pool), src, dst, jnp.int32(2))
    np.testing.assert_array_equal(np.asarray(copied), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_copy_pages_does_not_copy_the_pool(dtype):
    pool = program_arguments(dtype)[0]
    ids, count = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    check_in_place(jax.jit(copy_pages, donate_argnums=0).lower(pool, ids, ids, count).compile(), pool)
