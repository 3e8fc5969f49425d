"""The TPU kernels in the interpreter, which looks for races and fills unwritten memory with NaN, and their page layout."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import paged_attention, tpu, tpu_copy
from pallas_kernels.paged_attention.cases import CASES, Inputs, build
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.paged_attention.pages import CPU_DTYPES, kv_pool_shape, pack_tokens, plain_to_tpu, tpu_to_plain
from pallas_kernels.paged_attention.tpu_words import number_of_word, pack_words
from pallas_kernels.targets import TARGETS

TPU_CASES = [name for name, case in CASES.items() if case.sizes.page_dtype not in CPU_DTYPES]  # a CPU matter
# Together: both phases, windows, soft-caps, sinks, scales, heads under 64 and over, all packings, pages of 16 to 64.
QUICK = ("everything", "gqa4_head_128_bf16_pages", "int8_pages_scales")


def interpreter(cores: int = 1) -> Any:
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None
    return interpret_pallas_call.races.races_found


def run(inputs: Inputs, pages: np.ndarray, call: Any, **keywords: Any) -> tuple[np.ndarray, np.ndarray]:
    static = {**inputs.options, **keywords}
    program = jax.jit(functools.partial(call, scale=inputs.scale, **static))
    out, pages = program(inputs.q, inputs.k_new, inputs.v_new, pages, inputs.plan, **inputs.arrays)
    return np.asarray(out), np.asarray(pages)


def check(name: str, call: Any, **keywords: Any) -> None:
    """A call on the TPU layout against the reference on the plain one: results, and every byte of the pages."""
    case, inputs = CASES[name], build(CASES[name])
    expected, expected_pages = run(inputs, inputs.pages, paged_attention, implementation="reference")
    out, pages = run(inputs, plain_to_tpu(inputs.pages), call, **keywords)
    rows = sum(q_len for q_len, _ in case.batch)
    tolerance = 1e-2 if case.sizes.dtype == "bfloat16" else 1e-5
    assert out.dtype == inputs.q.dtype and np.isfinite(out.astype(np.float32)).all()
    np.testing.assert_allclose(
        out[:rows].astype(np.float64), expected[:rows].astype(np.float64), rtol=tolerance, atol=tolerance
    )
    plain, as_bytes = tpu_to_plain(pages, case.sizes.num_kv_heads, case.sizes.head_dim), f"u{pages.dtype.itemsize}"
    np.testing.assert_array_equal(plain[:, 1:].view(as_bytes), expected_pages[:, 1:].view(as_bytes))


@pytest.mark.parametrize("name", QUICK)
def test_kernel_matches_the_reference(name):
    check(name, by_keyword(tpu.paged_attention), interpret=interpreter())
    assert not races_found()


@pytest.mark.sweep
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", [name for name in TPU_CASES if name not in QUICK])
def test_kernel_matches_the_reference_on_every_case(name, cores):
    check(name, by_keyword(tpu.paged_attention), cores=cores, interpret=interpreter(cores))
    assert not races_found()


def test_two_cores_share_the_work():
    check("everything", by_keyword(tpu.paged_attention), cores=2, interpret=interpreter(2))
    assert not races_found()


def test_cores_of_each_device():
    assert [tpu.CORES.get(target.device_kind, 1) for target in TARGETS.values()] == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ["mixed", "mha_head_80", "int8_pages_scales"])
def test_other_implementations_take_the_tpu_layout(name, implementation):
    check(name, paged_attention, implementation=implementation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (2, 40), (3, 80), (1, 128), (2, 256)])
def test_layouts_convert_without_loss(heads, head_dim, dtype):
    sizes = dict(num_layers=2, num_pages=3, page_size=16, num_kv_heads=heads, head_dim=head_dim)
    numbers = np.random.default_rng(0).integers(-9, 9, kv_pool_shape("gpu", dtype=dtype, **sizes))
    plain = numbers.astype(getattr(ml_dtypes, dtype, dtype))
    stored = plain_to_tpu(plain)
    assert stored.shape == kv_pool_shape("tpu", dtype=dtype, **sizes)
    np.testing.assert_array_equal(tpu_to_plain(stored, heads, head_dim), plain)
    np.testing.assert_array_equal(np.asarray(tpu_to_plain(jnp.asarray(stored), heads, head_dim)), plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (8, 128), (3, 80), (1, 256)])
def test_words_are_packed_tokens(heads, head_dim, dtype):
    """`pack_words`, which stands for `pack_tokens` where the interpreter does not run."""
    rng = np.random.default_rng(0)
    k, v = (rng.normal(0, 9, (5, heads, head_dim)).astype(getattr(ml_dtypes, dtype, dtype)) for _ in range(2))
    packed = pack_tokens(k, v)  # [T, W, K, Dp]
    expected = np.moveaxis(packed, 2, 3).copy().view(np.uint32)[..., 0]  # numbers of a word next to each other
    words = np.asarray(pack_words(jnp.asarray(k), jnp.asarray(v)))
    np.testing.assert_array_equal(words.view(np.uint32)[:, :, 0], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_numbers_of_words(dtype):
    """The shifts that the interpreter's twin of `load_entry` replaces, on words that numpy makes out of numbers."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    packing = 4 // kind.itemsize
    numbers = np.random.default_rng(0).normal(0, 40, (5, packing)).astype(kind)
    words = jnp.asarray(numbers.view(np.uint32)[:, 0])
    for index in range(packing):
        found = number_of_word(words, index, dtype)
        np.testing.assert_array_equal(np.asarray(found), numbers[:, index].astype(np.float32))


def test_every_word_of_a_head_lies_at_a_stride():
    """`load_entry` reads words [N * W * lanes/128, 128] from `word * parts + part` on at stride `W * parts`."""
    tokens = np.arange(5 * 3 * 256, dtype=np.int32).reshape(5, 3, 1, 256)  # 4-byte numbers: one to a word
    flat = tokens.reshape(-1, 128)
    for word in range(3):
        parts = [flat[word * 2 + part :: 3 * 2] for part in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), tokens[:, word, 0])


def test_copy_pages():
    pool = np.arange(2 * 6 * 4 * 2 * 1 * 128, dtype=np.float32).reshape(2, 6, 4, 2, 1, 128)
    expected = pool.copy()
    expected[:, 4], expected[:, 5] = pool[:, 1], pool[:, 2]
    src, dst = jnp.array([1, 2, 3], jnp.int32), jnp.array([4, 5, 0], jnp.int32)
    copied = tpu_copy.copy_pages(jnp.asarray(pool), src, dst, jnp.int32(2), interpret=interpreter())
    np.testing.assert_array_equal(np.asarray(copied), expected)
    assert not races_found()
