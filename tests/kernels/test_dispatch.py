"""The entry points of paged attention refuse what does not fit, and dispatch says what runs and why."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import (
    AttentionPlan,
    PlanShape,
    copy_pages,
    fill_plan,
    kv_pool_dtype,
    kv_pool_shape,
    paged_attention,
    plan_fields,
)
from pallas_kernels.paged_attention.page_width import page_width
from pallas_kernels.paged_attention.pages import itemsize_of, token_shape
from pallas_kernels.paged_attention.plan import check_plan
from pallas_kernels.targets import TARGETS
from pallas_kernels.triton_offsets import why_not_offsets
from pallas_kernels.typical import typical_cases


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
    static["window"] = changes.pop("window", None)
    if isinstance(changes.get("layer"), int):
        static["layer"] = changes.pop("layer")
        del arrays["layer"]
    call = functools.partial(paged_attention, scale=0.125, **static)
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
        (dict(pages=jax.ShapeDtypeStruct((4, 9, 64), jnp.float32)), "pages: expected rank 6, see kv_pool_shape"),
        (dict(layer=jax.ShapeDtypeStruct((1,), jnp.int32)), "layer: expected a scalar integer"),
        (dict(layer=4), "layer: expected 0 … 3, found 4"),
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
    assert kv_pool_dtype("cpu", jnp.int8) == jnp.uint8 and kv_pool_dtype("gpu", jnp.int8) == jnp.int8
    assert kv_pool_shape("cpu", **{**sizes, "dtype": "int8"}) == (2, 5, 2, 3, 16, 68)  # and a scale's four bytes
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


MACHINES = [("cpu", "cpu"), *((target.platform, target.device_kind) for target in TARGETS.values())]


def attention_cases(platform: str, kind: str) -> Iterator[tuple[dispatch.Case, bool]]:
    """Cases over everything that a choice may depend on, and whether the pool has the platform's own layout."""
    dtypes = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint16", "uint8")
    sizes = itertools.product(
        dtypes, ("float32", "bfloat16", "float16"), (40, 64, 80, 128, 256, 512), (1, 3, 8), (8, 24, 64)
    )
    for (page_dtype, q_dtype, head_dim, group, page_size), layout in itertools.product(sizes, ("plain", "tpu", "none")):
        itemsize = itemsize_of(page_dtype)
        plain = (2, 9, 2, 4, page_size, page_width(head_dim, page_dtype))
        shape = {"plain": plain, "tpu": (2, 9, page_size, *token_shape(4, head_dim, itemsize)), "none": (2, 9, 7)}[
            layout
        ]
        kv = (16, 4, head_dim)
        case = dispatch.Case(
            platform,
            kind,
            {"q": (16, 4 * group, head_dim), "k_new": kv, "v_new": kv, "pages": shape},
            {"q": q_dtype, "k_new": q_dtype, "v_new": q_dtype, "pages": page_dtype},
            {"q_block": 8, "window": None, "softcap": None, "sinks": False, "kv_scales": False},
        )
        yield case, layout == ("tpu" if platform == "tpu" and page_dtype != "uint8" else "plain")


@pytest.mark.parametrize(("platform", "kind"), MACHINES)
def test_every_choice_is_the_first_that_can_run(platform, kind):
    """The choice, and all reasons, are those of the rows asked one by one; where nothing can run, all reasons are told."""
    seen = set()
    for case, own_layout in attention_cases(platform, kind):
        expected = [(row.name, row.why_not(case)) for row in dispatch.IMPLEMENTATIONS["paged_attention"]]
        able = [name for name, reason in expected if reason is None]
        if not able:
            assert not own_layout
            with pytest.raises(ValueError, match="no implementation of paged_attention can run") as refused:
                dispatch.choose("paged_attention", case, environ={})
            assert all(reason in str(refused.value) for _, reason in expected if reason)
            continue
        choice = dispatch.choose("paged_attention", case, environ={})
        assert choice.name == able[0] and dispatch.choose("paged_attention", case, environ={}) == choice
        assert choice.reasons[:-1] == tuple(expected[: len(choice.reasons) - 1])
        seen.add(choice.name)
    assert {"cpu": "xla", "gpu": "gpu_triton", "tpu": "tpu"}[platform] in seen


def test_the_tpu_kernel_serves_what_it_says():
    for case, own_layout in attention_cases("tpu", "TPU v6 lite"):
        serves = (
            own_layout
            and case.dtypes["pages"] not in ("float16", "uint16", "uint8")
            and case.dtypes["q"] != "float16"
            and case.shapes["q"][2] <= 256
            and case.shapes["pages"][2] != 24
        )
        if own_layout:
            assert (dispatch.choose("paged_attention", case, environ={}).name == "tpu") == serves, case


@pytest.mark.parametrize(("platform", "kind"), MACHINES)
def test_typical_cases_run_everywhere(platform, kind):
    cases = typical_cases(platform, kind)
    assert {op for op, _, _ in cases} == set(dispatch.IMPLEMENTATIONS)
    for op, _, case in cases:
        assert dispatch.choose(op, case, environ={}).name != "reference"


def test_choices_are_recorded_and_explained():
    pool, ids = jnp.zeros((1, 4, 2), jnp.float32), jnp.zeros(3, jnp.int32)
    jax.eval_shape(functools.partial(copy_pages, implementation="xla"), pool, ids, ids, jnp.int32(0))
    (line,) = [line for line in dispatch.explain().splitlines() if "pages float32[1, 4, 2]" in line]
    assert line.startswith("copy_pages: xla (xla: asked for (implementation='xla'))") and "traced 1×" in line


def test_the_report_names_chips_and_choices():
    from llm_infer.base.errors import UserError
    from llm_infer.commands.kernels import choices

    everything = choices()
    assert all(f"{name} (" in everything for name in ("here", *TARGETS))
    only = choices("v6e")
    assert only.startswith("v6e (TPU v6 lite)") and "cpu runs on cpu, not on tpu" in only
    with pytest.raises(UserError, match="expected one of here, v5e"):
        choices("v99")


def plan_of_two() -> AttentionPlan:
    shape = PlanShape(tokens=4, sequences=2, pages_per_seq=3, q_block=4)
    out = {name: np.zeros(dims, np.int32) for name, dims in plan_fields(shape).items()}
    fill_plan(shape, out, [1, 2], [17, 2], [[1, 2], [3]], page_size=16)
    return AttentionPlan(**out)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("block_tables", (0, 1), 9, r"plan.block_tables: page 1 of sequence 0 is 9, expected 0 … 4"),
        ("block_tables", (1, 0), -1, r"plan.block_tables: page 0 of sequence 1 is -1"),
        ("q_start", (2,), 5, "plan.q_start: expected to rise from 0 to at most T=4"),
        ("kv_len", (0,), 99, "plan.kv_len: sequence 0 is 99, expected 1 … 48"),
        ("write_slot", (3,), 80, "plan.write_slot: row 3 is 80, expected 0 … 79"),
        ("counts", (1,), 7, "plan.counts: expected"),
        ("items", (0, 0), 2, "plan.items: the sequence of item 0 is 2, expected 0 … 1"),
        ("items", (1, 2), 3, "plan.items: item 1 has rows 1 … 3, not rows of sequence 1"),
        ("items", (0, 4), 4, "plan.items: item 0 has pages 0 … 3 of 3"),
    ],
)
def test_a_plan_that_points_outside_is_refused(name, index, value, message):
    plan = plan_of_two()
    check_plan(plan, num_pages=5, page_size=16)
    getattr(plan, name)[index] = value
    with pytest.raises(ValueError, match=message):
        check_plan(plan, num_pages=5, page_size=16)


def test_checked_mode_checks_while_the_program_runs(monkeypatch):
    monkeypatch.setenv("LLM_INFER_CHECKED", "1")
    plan = plan_of_two()
    plan.block_tables[0, 1] = 9
    kv = jnp.zeros((4, 2, 64))
    call = jax.jit(functools.partial(paged_attention, layer=0, scale=1.0, implementation="xla"))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"plan.block_tables: page 1 of sequence 0 is 9, expected 0 … 4"
    ):
        jax.block_until_ready(call(kv, kv, kv, jnp.zeros((1, 5, 2, 2, 16, 64)), plan))
        jax.effects_barrier()


@pytest.mark.parametrize(
    ("gibibytes", "itemsize", "fits"), [(2, 1, True), (2.1, 1, False), (4, 1, False), (4.1, 1, True), (8, 2, True)]
)
def test_triton_refuses_arrays_whose_offsets_would_be_negative(gibibytes: float, itemsize: int, fits: bool) -> None:
    """JAX counts offsets in 32 bits with a sign up to 4 GiB: an H200 reported an illegal access for a pool of 2.0005 GiB."""
    shape = (2, int(gibibytes * (1 << 30)) // itemsize // 2)
    assert (why_not_offsets(shape, itemsize) is None) == fits
    if itemsize == 1:
        pages = (2, int(gibibytes * (1 << 30)) // (2 * 2 * 8 * 64 * 128), 2, 8, 64, 128)
        shapes = {"q": (64, 32, 128), "k_new": (64, 8, 128), "pages": pages}
        dtypes = {"q": "bfloat16", "pages": "int8"}
        said = dispatch.choose(
            "paged_attention", dispatch.Case("gpu", "NVIDIA H200", shapes, dtypes, {"kv_scales": True})
        )
        assert (said.name == "gpu_triton") == fits, said
