"""Native CPU attention: the shared cases against textbook attention, bitwise equal rows in any batch, errors not crashes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from pallas_kernels.cpu_ffi import why_not
from pallas_kernels.cpu_ffi.threads import thread_pool
from pallas_kernels.dispatch import Case
from pallas_kernels.paged_attention import cpu
from pallas_kernels.paged_attention.cases import CASES, LAYER, MIXED, AttentionCase, Inputs, Sizes, build
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.paged_attention.page_width import page_width
from pallas_kernels.paged_attention.pages import turn_keys
from tests.kernels import native_call
from tests.kernels.test_paged_attention import check_in_place, num_rows, program_arguments, textbook

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"native CPU kernels: {why_not()}")
NATIVE_CASES = [name for name, case in CASES.items() if case.sizes.page_dtype in cpu.PAGE_DTYPES]
ROOT = Path(__file__).parents[2]


@functools.cache
def jitted(scale: float, options: tuple):
    return jax.jit(functools.partial(by_keyword(cpu.paged_attention), scale=scale, **dict(options)))


def run(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    attend = jitted(inputs.scale, tuple(inputs.options.items()))
    out, pages = attend(inputs.q, inputs.k_new, inputs.v_new, turn_keys(inputs.pages), inputs.plan, **inputs.arrays)
    return np.asarray(out), turn_keys(np.asarray(pages), back=True)


@functools.cache
def answer(name: str) -> np.ndarray:
    return run(build(CASES[name]))[0]


@pytest.mark.parametrize("name", NATIVE_CASES)
def test_is_the_textbook(name):
    case, inputs = CASES[name], build(CASES[name])
    out, pages = run(inputs)
    expected = textbook(case, inputs)
    tolerance = 1e-2 if case.sizes.dtype == "bfloat16" else 1e-5
    assert out.dtype == inputs.q.dtype and np.isfinite(out.astype(np.float32)).all()
    np.testing.assert_allclose(out[: len(expected)].astype(float), expected, rtol=tolerance, atol=tolerance)

    # Every token is in its slot to the last bit, and nothing else but the null page has changed.
    bits, size = f"u{pages.dtype.itemsize}", case.sizes.page_size
    wanted = inputs.pages.copy()
    for table, stored in zip(inputs.plan.block_tables, inputs.stored, strict=False):
        for position in range(stored.shape[1]):
            wanted[LAYER, table[position // size], :, :, position % size] = stored[:, position]
    np.testing.assert_array_equal(pages[:, 1:].view(bits), wanted[:, 1:].view(bits))
    np.testing.assert_array_equal(pages[0].view(bits), inputs.pages[0].view(bits))


@pytest.mark.parametrize(("head_dim", "page_dtype"), [(2, "float32"), (12, "uint8"), (40, "float32"), (72, "uint16")])
def test_heads_that_fill_no_vector(head_dim, page_dtype):
    case = replace(CASES["mixed"], sizes=replace(CASES["mixed"].sizes, head_dim=head_dim, page_dtype=page_dtype))
    expected, (out, _) = textbook(case, inputs := build(case)), run(inputs)
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    """Bitwise: among neighbours, alone, on other pages, in another token bucket, whatever the threads."""
    mixed, tiny = answer("mixed"), answer("tiny_bucket_decode")
    alone, _ = run(build(AttentionCase(CASES["mixed"].sizes, MIXED[:1])))
    np.testing.assert_array_equal(alone[0], mixed[0])
    np.testing.assert_array_equal(tiny[0], mixed[0])
    pool, rows = thread_pool(), num_rows(CASES["mixed"])
    before = pool.threads
    try:
        for threads in (1, 3):
            pool.set_threads(threads)
            np.testing.assert_array_equal(run(build(CASES["mixed"]))[0][:rows], mixed[:rows])
    finally:
        pool.set_threads(before)


@pytest.mark.parametrize("lanes", [4, 16])
def test_code_for_other_vector_widths(lanes):
    """A ragged batch by the code for NEON's and AVX-512's widths (LLVM splits what this CPU does not have)."""
    case, inputs = CASES["everything"], build(CASES["everything"])
    scalars = {"window": 37, "scale": inputs.scale, "softcap": 5.0} | inputs.arrays
    names = ("layer", "window", "scale", "softcap", "k_scale", "v_scale", "sinks")
    rest = [np.asarray(scalars[n], np.int32 if n in ("layer", "window") else np.float32) for n in names]
    kernel, pages = cpu.attention_kernel(64, "float32", True, True, True), turn_keys(inputs.pages)
    out, partial = np.full(inputs.q.shape, np.nan, np.float32), np.empty((2048, 3 * 66), np.float32)
    args = [inputs.q, inputs.k_new, inputs.v_new, pages, *inputs.plan, *rest]
    native_call.call(kernel, args, [out, pages, partial], lanes=lanes)
    expected = textbook(case, inputs)
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_chunks_of_a_prompt_and_a_long_decode_batch_give_the_same_bits():
    """700 tokens: as one chunk, as chunks of 300 and 400, and the last one decoded alone or among many sequences."""
    length, page_size, first = 700, 16, 300
    whole = Sizes(6, 2, 64, page_size, tokens=length, sequences=1, pages_per_seq=44, q_block=64)
    inputs = build(AttentionCase(whole, ((length, length),)))
    expected, _ = run(inputs)

    def part(begin: int, end: int, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes = Sizes(6, 2, 64, page_size, tokens=end - begin, sequences=1, pages_per_seq=44, q_block=48)
        chunk = build(AttentionCase(sizes, ((end - begin, end),)), num_pages=inputs.pages.shape[1])
        slots, tables = inputs.plan.write_slot[begin:end], inputs.plan.block_tables
        plan = chunk.plan._replace(block_tables=tables, write_slot=slots)
        out, pages = jitted(inputs.scale, ())(
            inputs.q[begin:end], inputs.k_new[begin:end], inputs.v_new[begin:end], pages, plan, layer=jnp.int32(LAYER)
        )
        return np.asarray(out), np.asarray(pages)

    head, pages = part(0, first, turn_keys(inputs.pages))
    tail, _ = part(first, length - 1, pages)
    _, pages = part(first, length - 1, pages)
    last, _ = part(length - 1, length, pages)
    np.testing.assert_array_equal(head, expected[:first])
    np.testing.assert_array_equal(tail, expected[first : length - 1])
    np.testing.assert_array_equal(last, expected[length - 1 :])

    many = Sizes(6, 2, 64, page_size, tokens=20, sequences=20, pages_per_seq=44, q_block=8)  # too many to share splits
    one = Sizes(6, 2, 64, page_size, tokens=2, sequences=2, pages_per_seq=44, q_block=8)
    among, _ = run(build(AttentionCase(many, ((1, length), *((1, 20 + i) for i in range(19))))))
    alone, _ = run(build(AttentionCase(one, ((1, length),))))
    np.testing.assert_array_equal(among[0], alone[0])


def test_wrong_buffers_and_plans_are_errors():
    inputs = build(CASES["tiny_bucket_decode"])
    plan, layer = inputs.plan, jnp.int32(LAYER)
    items = np.array(plan.items)
    items[0, 1] = 7  # a row past T
    wrong = {
        "argument k_new has size": {"k_new": inputs.k_new[:1]},
        "argument q_start: expected one entry more": {"plan": plan._replace(q_start=plan.q_start[:-1])},
        "argument block_tables has XLA_FFI_DataType": {"plan": plan._replace(block_tables=plan.block_tables * 1.0)},
        "argument counts does not fit items": {"plan": plan._replace(counts=plan.counts + 100)},
        "argument items names rows": {"plan": plan._replace(items=items)},
        "argument layer is out of range": {"layer": jnp.int32(2)},
        "argument layer has rank 1": {"layer": jnp.zeros(1, jnp.int32)},
        "page size is not 16": {"pages": inputs.pages[:, :, :, :, :8]},
    }
    for message, change in wrong.items():
        given = dict(q=inputs.q, k_new=inputs.k_new, v_new=inputs.v_new, pages=inputs.pages, plan=plan, layer=layer)
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(by_keyword(cpu.paged_attention)(**(given | change), scale=0.125))
    run(inputs)


def test_why_not_names_what_is_missing():
    def reason(page_dtype="float32", page_size=16, head_dim=64) -> str | None:
        width = page_width(head_dim, page_dtype)
        shapes = {"k_new": (4, 2, head_dim), "pages": (2, 8, 2, 2, page_size, width)}
        return cpu.why_not(Case("cpu", "cpu", shapes, {"pages": page_dtype}))

    assert reason() is None and reason("uint16", 32, 80) is None and reason("uint8", 32, 80) is None
    assert "float8_e4m3fn" in (reason("float8_e4m3fn") or "")
    assert "24" in (reason(page_size=24) or "") and "7" in (reason(head_dim=7) or "")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_scan_does_not_copy_the_pool(dtype):
    pool, q, kv, plan = program_arguments(dtype)

    def step(pages, q, kv, plan):
        def layer_step(carry, layer):
            x, pages = carry
            return by_keyword(cpu.paged_attention)(x, kv, kv, pages, plan, layer=layer, scale=0.125), None

        return jax.lax.scan(layer_step, (q, pages), jnp.arange(pages.shape[0], dtype=jnp.int32))[0]

    check_in_place(jax.jit(step, donate_argnums=0).lower(pool, q, kv, plan).compile(), pool)


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
def test_copy_pages(dtype):
    pool = np.arange(3 * 6 * 2 * 5 * 7).reshape(3, 6, 2, 5, 7).astype(dtype)
    src, dst = jnp.array([1, 2, 3], jnp.int32), jnp.array([4, 5, 0], jnp.int32)
    expected = pool.copy()
    expected[:, 4], expected[:, 5] = pool[:, 1], pool[:, 2]
    copied = jax.jit(cpu.copy_pages, donate_argnums=0)(jnp.asarray(pool), src, dst, jnp.int32(2))
    np.testing.assert_array_equal(np.asarray(copied), expected)
    with pytest.raises(Exception, match="argument count is more than the pairs"):
        jax.block_until_ready(cpu.copy_pages(jnp.asarray(pool), src, dst, jnp.int32(4)))


def test_copy_pages_does_not_copy_the_pool():
    pool = program_arguments(jnp.float32)[0]
    ids, count = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    check_in_place(jax.jit(cpu.copy_pages, donate_argnums=0).lower(pool, ids, ids, count).compile(), pool)


def test_four_devices_at_once():
    script = Path(__file__).parent / "shard_map_native.py"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-2000:]
