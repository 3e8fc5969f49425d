"""The entry points of paged attention refuse what does not fit, and dispatch says what runs and why."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import (
    AttentionPlan,
    PlanShape,
    copy_pages,
    kv_pool_dtype,
    kv_pool_shape,
    paged_attention,
    plan_fields,
)


def legal_arguments():
    """Shapes of pages, q, k_new (and v_new) and the plan of a call that is right."""
    array = jax.ShapeDtypeStruct
    fields = plan_fields(PlanShape(tokens=8, sequences=4, pages_per_seq=64, q_block=4))
    plan = AttentionPlan(**{name: array(dims, jnp.int32) for name, dims in fields.items()})
    pages, q = array((4, 256, 2, 2, 64, 64), jnp.float32), array((8, 6, 64), jnp.float32)
    return pages, q, array((8, 2, 64), jnp.float32), plan


def replaced(**changes):
    """A legal call, with some arguments replaced by others' shapes."""
    array = jax.ShapeDtypeStruct
    pages, q, kv, plan = legal_arguments()
    plan = plan._replace(**{name: changes.pop(name) for name in plan._fields if name in changes})
    arrays = dict(q=q, k_new=kv, v_new=kv, pages=pages, plan=plan, layer=array((), jnp.int32))
    static = {"implementation": changes.pop("implementation", None), "softcap": changes.pop("softcap", None)}
    window = changes.pop("window", None)
    call = functools.partial(paged_attention, scale=0.125, window=window, **static)
    return jax.eval_shape(call, **{**arrays, **changes})


def test_legal_call_passes_the_checks():
    out, pages = replaced()
    assert out.shape == (8, 6, 64) and pages.shape == (4, 256, 2, 2, 64, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=jax.ShapeDtypeStruct((8, 5, 64), jnp.float32)), "q: expected a number of heads.*multiple of Hkv=2"),
        (dict(q=jax.ShapeDtypeStruct((8, 64), jnp.float32)), "q: expected rank 3"),
        (dict(q=jax.ShapeDtypeStruct((8, 6, 64), jnp.int32)), "q: expected a floating dtype"),
        (dict(k_new=jax.ShapeDtypeStruct((8, 2, 32), jnp.float32)), r"k_new: expected \[T=8, Hkv, D=64\]"),
        (dict(v_new=jax.ShapeDtypeStruct((8, 1, 64), jnp.float32)), "v_new: expected the shape of k_new"),
        (dict(pages=jax.ShapeDtypeStruct((4, 9, 2, 2, 16, 64), jnp.int32)), "pages: expected a dtype of float32"),
        (dict(pages=jax.ShapeDtypeStruct((4, 9, 2, 3, 16, 64), jnp.float32)), r"no implementation.*Hkv=2, C, D=64"),
        (dict(kv_len=jax.ShapeDtypeStruct((4,), jnp.float32)), "plan.kv_len: expected int32"),
        (dict(q_start=jax.ShapeDtypeStruct((4,), jnp.int32)), r"plan.q_start: expected \[S\+1=5\]"),
        (dict(items=jax.ShapeDtypeStruct((4, 5), jnp.int32)), r"plan.items: expected \[N, 5\]"),
        (dict(layer=jax.ShapeDtypeStruct((1,), jnp.int32)), "layer: expected a scalar integer"),
        (dict(sinks=jax.ShapeDtypeStruct((2,), jnp.float32)), r"sinks: expected floats of shape \[Hq=6\]"),
        (dict(window=0), "window is 0"),
        (dict(softcap=-1.0), "softcap is -1.0"),
        (dict(implementation="cuda"), "no such implementation, choose from"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replaced(**changes)


def test_kv_pool_shape():
    sizes = dict(num_layers=2, num_pages=5, page_size=16, num_kv_heads=3, head_dim=64, dtype=jnp.float32)
    assert kv_pool_shape("cpu", **sizes) == kv_pool_shape("gpu", **sizes) == (2, 5, 2, 3, 16, 64)
    assert kv_pool_shape("tpu", **sizes) == (2, 5, 16, 3, 1, 128)  # K and V of a head of 64 share the lanes
    assert kv_pool_shape("tpu", **{**sizes, "head_dim": 80, "dtype": "bfloat16"}) == (2, 5, 16, 3, 2, 128)
    assert kv_pool_shape("tpu", **{**sizes, "head_dim": 256, "dtype": "int8"}) == (2, 5, 16, 2, 4, 256)
    for wrong, message in (
        (dict(num_pages=1), "num_pages"),
        (dict(page_size=0), "page_size"),
        (dict(dtype="int32"), "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            kv_pool_shape("cpu", **{**sizes, **wrong})
    with pytest.raises(ValueError, match="platform"):
        kv_pool_shape("abacus", **sizes)
    assert kv_pool_dtype("cpu", jnp.bfloat16) == jnp.uint16  # the same bits, as integers
    assert kv_pool_dtype("cpu", jnp.float32) == jnp.float32 and kv_pool_dtype("tpu", jnp.bfloat16) == jnp.bfloat16


def test_copy_pages_checks_its_arguments():
    pool, ids, count = jnp.zeros((1, 4, 2)), jnp.zeros((3,), jnp.int32), jnp.int32(1)
    with pytest.raises(ValueError, match="count: expected int32 of rank 0"):
        copy_pages(pool, ids, ids, ids)
    with pytest.raises(ValueError, match=r"dst: expected the shape of src, \[3\]"):
        copy_pages(pool, ids, ids[:2], count)
    with pytest.raises(ValueError, match="src: expected int32 of rank 1"):
        copy_pages(pool, ids.astype(jnp.float32), ids, count)


def test_dispatch_table_and_overrides():
    shapes = {"pages": (2, 5, 2, 3, 16, 64), "k_new": (8, 3, 64)}
    dtypes = {"pages": "float32"}
    case = dispatch.Case("cpu", "cpu", shapes, dtypes)
    other_layout = dispatch.Case("cpu", "cpu", {**shapes, "pages": (2, 5, 3)}, dtypes)
    table = {row.name for row in dispatch.IMPLEMENTATIONS["paged_attention"]}
    assert {"xla", "reference"} <= table

    forced = dispatch.choose(
        "paged_attention", case, environ={"LLM_INFER_KERNELS": " paged_attention=reference,copy_pages=xla"}
    )
    assert forced.name == "reference" and "LLM_INFER_KERNELS" in str(forced)
    assert (
        dispatch.choose("paged_attention", case, "xla", {"LLM_INFER_KERNELS": "paged_attention=reference"}).name
        == "xla"
    )
    with pytest.raises(ValueError, match=r"cannot run it here: xla needs pages of shape"):
        dispatch.choose("paged_attention", other_layout, "xla")
    with pytest.raises(ValueError, match=r"LLM_INFER_KERNELS has paged_attention=fast.*choose from"):
        dispatch.choose("paged_attention", case, environ={"LLM_INFER_KERNELS": "paged_attention=fast"})
    for text in ("paged_attention", "attention=xla"):
        with pytest.raises(ValueError, match="expected op=implementation"):
            dispatch.choose("paged_attention", case, environ={"LLM_INFER_KERNELS": text})

    row = dispatch.Implementation("far", "no.such.module", platforms=("tpu",), requires=("no_such_package_xyz",))
    assert row.why_not(case) == "runs on tpu, not on cpu"
    on_tpu = dispatch.Case("tpu", "TPU v5 lite", shapes, dtypes)
    assert "needs the package no_such_package_xyz" in (row.why_not(on_tpu) or "")
    assert dispatch.target() == ("cpu", "cpu")
