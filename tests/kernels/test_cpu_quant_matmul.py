"""The native quantised matmul: every block format against dequantise + matmul, and bitwise equal rows for every M."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

import llvmlite.binding as llvm

from llm_infer.quant import StoredWeights
from pallas_kernels.cpu_ffi import why_not
from pallas_kernels.cpu_ffi.compile import Target, emit_assembly
from pallas_kernels.cpu_ffi.threads import thread_pool
from pallas_kernels.quant_matmul import FORMATS, Norm, cpu, quant_matmul, reference, tiles
from pallas_kernels.quant_matmul.cases import ROWS, random_blocks, random_rows, shapes
from tests.kernels import native_call

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"native CPU kernels: {why_not()}")
GOLDENS = Path(__file__).parent / "gguf_blocks.npz"


def native(
    kind: str,
    x: np.ndarray,
    blocks: np.ndarray,
    layer: int,
    lanes: int | None = None,
    features: str | None = None,
) -> np.ndarray:
    out = np.full((len(x), blocks.shape[1]), np.nan, np.float32)
    args = [x, blocks, np.array(layer, np.int32)]
    native_call.call(cpu.matmul_kernel(kind), args, [out], lanes=lanes, features=features)
    return out


def native_int8(kind: str, x: np.ndarray, blocks: np.ndarray, lanes: int | None = None) -> np.ndarray:
    (m, k), n = x.shape, blocks.shape[1]
    scratch = [np.empty((m, k), np.int8), *(np.empty((m, k // 32), np.float32) for _ in range(2))]
    out = np.full((m, n), np.nan, np.float32)
    native_call.call(cpu.int8_kernel(kind), [x, blocks, np.array(0, np.int32)], [out, *scratch], lanes=lanes)
    return out


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if FORMATS[kind].dtype == "uint8"])
def test_reference_dequantises_as_ggml(kind):
    """Against the `gguf` package's dequantize on random blocks (the .npz was made with gguf 0.19 by dequantize(blocks))."""
    stored = np.load(GOLDENS)
    blocks, weights = jnp.asarray(stored[f"{kind}_blocks"]), stored[f"{kind}_weights"]
    np.testing.assert_array_equal(reference.dequantise(blocks, kind), weights)
    embedding = StoredWeights((blocks[None],), (kind,), ((0, 0),))
    np.testing.assert_array_equal(embedding.rows(jnp.array([2, 0, 2])), weights[[2, 0, 2]])


@cache
def matrices_of(kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Blocks [2, N, R] and the float64 weights [N, K] of layer 1, for every shape (one program for all)."""
    every = [random_blocks(kind, 2, n, k, seed=n) for n, k in shapes(kind)]
    flat = jax.jit(reference.dequantise, static_argnums=1)(np.concatenate([b[1].reshape(-1) for b in every]), kind)
    ends = np.cumsum([n * k for n, k in shapes(kind)])[:-1]
    weights = np.split(np.asarray(flat, np.float64), ends)
    return [(b, w.reshape(shape)) for b, w, shape in zip(every, weights, shapes(kind), strict=True)]


def cases_of(kind: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`matrices_of` with activations [M, K] before them."""
    return ((random_rows(max(ROWS), weights.shape[1]), blocks, weights) for blocks, weights in matrices_of(kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_equals_dequantise_and_matmul(kind):
    """For every M, odd N, N under a tile, K beyond a tile; the error is relative to the sum of the terms' sizes."""
    for x, blocks, weights in cases_of(kind):
        expected, size = x @ weights.T, np.abs(x) @ np.abs(weights).T
        for m in ROWS:
            out = native(kind, x[:m], blocks, 1)
            assert (np.abs(out - expected[:m]) <= 1e-6 * size[:m]).all(), (weights.shape, m)


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("kind", ["q4_1", "q5_0", "mxfp4", "q2_k", "q3_k", "q6_k", "iq4_xs"])
def test_code_for_other_vector_widths(kind, lanes):
    for x, blocks, weights in cases_of(kind):
        expected, size = x @ weights.T, np.abs(x) @ np.abs(weights).T
        for m in (1, 8, 49):
            out = native(kind, x[:m], blocks, 1, lanes)
            assert (np.abs(out - expected[:m]) <= 1e-6 * size[:m]).all(), (weights.shape, m)


@pytest.mark.parametrize("lanes", [4, 8])
def test_values_are_looked_up_without_instructions_for_it(lanes):
    """As on x86 before SSSE3; the result has the same bits."""
    blocks, x = random_blocks("iq4_nl", 1, 5, 512), random_rows(3, 512)
    expected = native("iq4_nl", x, blocks, 0, lanes)
    np.testing.assert_array_equal(native("iq4_nl", x, blocks, 0, lanes, features=""), expected)


def test_values_are_looked_up_by_neon_on_arm64():
    """The code is made and read, not run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = Target("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon", lanes=4, registers=32, unit_lanes=4)
    code = emit_assembly(cpu.matmul_kernel("iq4_nl").build(target), target)
    assert "tbl" in code and "fmla" in code


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_do_not_depend_on_the_batch_or_the_threads(kind):
    blocks, x = random_blocks(kind, 1, 53, 1536), random_rows(max(ROWS), 1536)
    expected = native(kind, x, blocks, 0)
    pool = thread_pool()
    before = pool.threads
    try:
        for threads in (1, 3):
            pool.set_threads(threads)
            for m in ROWS:
                np.testing.assert_array_equal(native(kind, x[:m], blocks, 0), expected[:m])
    finally:
        pool.set_threads(before)


@pytest.mark.parametrize("kind", cpu.INT8_KINDS)
def test_fast_is_exact_but_for_the_rounding_of_activations(kind):
    """Equal to a matmul of activations rounded to int8 in blocks of 32; the same bits for every M and vector width."""
    for x, blocks, weights in cases_of(kind):
        x[1], blocks = 0.0, blocks[1:]
        grouped = x.reshape(len(x), -1, 32)
        scale = np.abs(grouped).max(-1, keepdims=True) / np.float32(127)
        rounded = np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale > 0).round() * scale.astype(float)
        rounded = rounded.reshape(x.shape)
        # A quotient next to a half may go to either side: one number may be one step off.
        tolerance = 1e-6 * (np.abs(rounded) @ np.abs(weights).T) + scale.max() * np.abs(weights).max()
        every_row = native_int8(kind, x, blocks)
        assert (np.abs(every_row - rounded @ weights.T) <= tolerance).all(), weights.shape
        for m in ROWS:
            np.testing.assert_array_equal(native_int8(kind, x[:m], blocks), every_row[:m])
        for lanes in (4, 16) if kind in ("q4_1", "q8_0") else ():
            np.testing.assert_array_equal(native_int8(kind, x, blocks, lanes), every_row)


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_a_normed_row_has_the_same_bits_for_every_number_of_rows(kind):
    rng = np.random.default_rng(0)
    blocks = jnp.asarray(rng.standard_normal((1, 24, 64)), {"bf16": jnp.bfloat16, "f32": jnp.float32}[kind])
    x, norm = jnp.asarray(rng.standard_normal((130, 64)), jnp.float32), Norm(jnp.ones((1, 64)), 0, 1e-5)
    product = jax.jit(lambda x: quant_matmul(x, blocks, norm=norm, kind=kind, implementation="cpu"))
    whole = np.asarray(product(x))
    for rows in (1, 2, 15, 63, 64, 65, 129):
        np.testing.assert_array_equal(product(x[:rows]), whole[:rows])


def test_called_by_xla_with_the_layer_of_a_scan():
    blocks, x = random_blocks("q4_1", 3, 64, 64), random_rows(2, 64)

    @jax.jit
    def all_layers(x, blocks):
        def step(x, layer):
            return cpu.quant_matmul(x, blocks, layer, kind="q4_1"), None

        return jax.lax.scan(step, x, jnp.arange(3, dtype=jnp.int32))[0]

    expected = x
    for layer in range(3):
        expected = native("q4_1", expected, blocks, layer)
    np.testing.assert_array_equal(np.asarray(all_layers(x, blocks)), expected)


def test_wrong_buffers_are_errors():
    """Each is refused by the handler itself, with the argument's name; the process lives."""
    x, blocks, layer = jnp.zeros((2, 64)), jnp.zeros((2, 3, 40), jnp.uint8), jnp.int32(0)
    target = cpu.matmul_kernel("q4_1").register()
    wrong = {
        "argument x has XLA_FFI_DataType": (x.astype(jnp.int32), blocks, layer),
        "argument x has rank 1": (x[0], blocks, layer),
        "argument blocks has XLA_FFI_DataType": (x, blocks.astype(jnp.int8), layer),
        "argument layer has rank 1": (x, blocks, layer[None]),
        "rows do not hold K weights": (x, blocks[..., 1:], layer),
        "K is not a multiple of 32": (x[:, :48], blocks, layer),
        "argument layer is out of range": (x, blocks, jnp.int32(2)),
        "quant_matmul_q4_1: argument layer is out": (x, blocks, jnp.int32(-1)),
        "expected 3 arguments, found 2": (x, blocks),
        "result out has size 2 on axis 0, expected M = 3 as in argument x": (jnp.zeros((3, 64)), blocks, layer),
    }
    for message, args in wrong.items():
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((2, 3), jnp.float32))(*args))
    assert cpu.quant_matmul(x, blocks, layer, kind="q4_1").shape == (2, 3)


def test_the_op_picks_the_native_kernel_and_checks_its_arguments():
    x, blocks = random_rows(3, 64), random_blocks("q4_1", 2, 5, 64)
    chosen = jax.jit(lambda x, blocks: quant_matmul(x, blocks, 1, kind="q4_1"))(x, blocks)
    np.testing.assert_array_equal(np.asarray(chosen), native("q4_1", x, blocks, 1))
    plain = quant_matmul(jnp.asarray(x), jnp.asarray(blocks), 1, kind="q4_1", implementation="reference")
    np.testing.assert_allclose(np.asarray(chosen), np.asarray(plain), rtol=1e-4, atol=1e-5)
    tiled = random_blocks("q4_1", 2, 48, 64)
    plain = quant_matmul(jnp.asarray(x), jnp.asarray(tiled), 1, kind="q4_1", implementation="reference")
    tiles.tile_rows(tiled, "q4_1")
    for name in ("cpu", "xla", "reference"):
        out = quant_matmul(jnp.asarray(x), jnp.asarray(tiled), 1, kind="q4_1", tiled=True, implementation=name)
        np.testing.assert_allclose(np.asarray(out), np.asarray(plain), rtol=1e-4, atol=1e-5)
        gated = quant_matmul(
            jnp.asarray(x), jnp.asarray(tiled), 1, jnp.asarray(x[::-1]), kind="q4_1", tiled=True, implementation=name
        )
        product = x[::-1] / (1 + np.exp(-x[::-1])) * x
        weights = reference.dequantise(tiles.untile(jnp.asarray(tiled[1]), "q4_1"), "q4_1")
        np.testing.assert_allclose(np.asarray(gated), product @ np.asarray(weights).T, rtol=1e-4, atol=1e-5)
    wrong = {
        "tiled rows of q4_1 must be a multiple of 16, found 5": dict(kind="q4_1", tiled=True),
        "kind is 'iq3_s'": dict(kind="iq3_s"),
        "precision is 'best'": dict(kind="q4_1", precision="best"),
        "x: expected float32": dict(kind="q4_1", x=jnp.zeros((3, 64), jnp.int32)),
        "expected rows of 36 uint8": dict(kind="q4_0"),
        "blocks: expected float32": dict(kind="f32"),
        r"gate: expected float32 \[3, 64\], as x, found float32 of shape \[2, 64\]": dict(
            kind="q4_1", gate=jnp.zeros((2, 64), jnp.float32)
        ),
        "row of 48 weights": dict(kind="q4_1", x=jnp.zeros((3, 48))),
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            quant_matmul(**({"x": jnp.asarray(x), "blocks": jnp.asarray(blocks)} | change))
