"""The quantised matmul on tiled rows: every kind of block against dequantise + matmul, in any batch and for any CPU's code."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

import llvmlite.binding as llvm

from pallas_kernels.cpu_ffi import why_not
from pallas_kernels.cpu_ffi.compile import Target, emit_assembly, host_target
from pallas_kernels.quant_matmul import PRECISIONS, Norm, cpu, cpu_activations, quant_matmul, tiles
from pallas_kernels.quant_matmul.cases import ROWS, random_blocks, random_rows
from pallas_kernels.quant_matmul.cpu_dot import by_pairs
from pallas_kernels.quant_matmul.cpu_tile_kinds import KINDS
from pallas_kernels.quant_matmul.weave import weave
from tests.kernels import native_call
from tests.kernels.test_cpu_quant_matmul import cases_of

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"native CPU kernels: {why_not()}")
SAMPLE = ("q4_1", "q8_0", "q5_k", "q3_k")  # one digit and three, whole runs and halves, with minima and without
X86, AVX512 = "x86_64-unknown-linux-gnu", "+avx512f,+avx512bw,+avx512vl,+avx512dq,"
CPUS = {
    "amx": (
        Target(X86, "sapphirerapids", "+avx2,+fma,+ssse3," + AVX512 + "+avx512vnni,+amx-tile,+amx-int8", 16, 32, 16),
        "vpdpbusd",
        "zmm",
    ),
    "vnni": (Target(X86, "znver4", "+avx2,+fma,+ssse3," + AVX512 + "+avx512vnni", 16, 32, 16), "vpdpbusd", "zmm"),
    "avxvnni": (Target(X86, "alderlake", "+avx2,+fma,+ssse3,+avxvnni", 8, 16, 8), "vpdpbusd", "ymm"),
    "avx512": (
        Target(X86, "skylake-avx512", "+avx2,+fma,+ssse3," + AVX512.rstrip(","), 16, 32, 16),
        "vpmaddubsw",
        "zmm",
    ),
    "avx2": (Target(X86, "znver3", "+avx2,+fma,+ssse3", 8, 16, 8), "vpmaddubsw", "ymm"),
    "dotprod": (Target("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod", 4, 32, 4), "sdot", ".16b"),
}
"""A CPU of each sort, the instruction that it must use, and what its registers are called."""


ROUNDED = ("q8_0", "iq4_nl", "iq4_xs")
"""Kinds whose numbers have eight bits: their sums with 23 bits are put together in float32."""


def some(sample: tuple[str, ...]) -> list:
    """All kinds, those that are not in the sample only in the sweep."""
    return [kind if kind in sample else pytest.param(kind, marks=pytest.mark.sweep) for kind in tiles.SEGMENTS]


def native_tiles(kind: str, precision: str, x: np.ndarray, blocks: np.ndarray, lanes: int | None = None) -> np.ndarray:
    """Layer 1 of `blocks`, which have the file's order."""
    (m, k), n = x.shape, blocks.shape[1]
    groups, units = -(-m // cpu.TILE_GROUP), cpu_activations.units(kind, cpu.digits(kind, precision))
    place = (groups, k // 32, cpu.places(m))
    scratch = [np.full((*place, units, 32), 99, np.int8), *(np.full(s, np.nan, "f") for s in (place, (*place, 2)))]
    out = np.full((m, n), np.nan, np.float32)
    tiled = blocks.copy()
    tiles.tile_rows(tiled, kind)
    kernel = cpu.tiles_kernel(kind, precision)
    native_call.call(kernel, [x, tiled, np.array(1, np.int32)], [out, *scratch], lanes=lanes)
    return out


def tiled_cases(kind: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """As `cases_of`, those whose rows can be tiled."""
    return (case for case in cases_of(kind) if tiles.can_tile(kind, case[1].shape[1]))


@pytest.mark.parametrize("kind", tiles.SEGMENTS)
def test_tiles_are_a_permutation_that_can_be_undone(kind):
    blocks = random_blocks(kind, 2, 48, 512)
    tiled, woven = blocks.copy(), np.empty_like(blocks)
    tiles.tile_rows(tiled, kind)
    assert (tiled != blocks).any()
    np.testing.assert_array_equal(tiles.untile(jnp.asarray(tiled), kind), blocks)
    ids = np.array([0, 17, 47, 5, 5])
    np.testing.assert_array_equal(tiles.take_rows(jnp.asarray(tiled[1]), jnp.asarray(ids), kind), blocks[1][ids])
    with pytest.raises(ValueError, match="40 rows"):
        tiles.tile_rows(tiled[:, :40], kind)
    for rows, out in zip(blocks, woven, strict=True):
        weave(rows, out, kind)
    np.testing.assert_array_equal(woven, tiled)


def test_weaving_refuses_what_it_cannot_write():
    rows = random_blocks("q4_1", 1, 32, 64)[0]
    for out, message in (
        (np.empty((32, 64), np.uint8)[:, ::2], "out: expected contiguous"),
        (np.empty((32, 39), np.uint8), "out: expected contiguous"),
        (rows, "memory of its own|array of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            weave(rows, out, "q4_1")
    with pytest.raises(ValueError, match="20 rows"):
        weave(rows[:20], np.empty_like(rows[:20]), "q4_1")


@pytest.mark.parametrize("kind", tiles.SEGMENTS)
def test_tiles_equal_dequantise_and_matmul(kind):
    """`exact` errs no more than a float32 sum may; in any batch a row has the same bits."""
    for x, blocks, weights in tiled_cases(kind):
        x[:, :32] *= 1e4  # an outlier must not cost its neighbours' digits
        x[1, -32:] = 0.0
        expected, size = x @ weights.T, np.abs(x) @ np.abs(weights).T
        every_row = native_tiles(kind, "exact", x, blocks)
        most = 6e-7 if kind == "q5_1" else 5e-7  # one rounding more: that of the minimum and the bias
        assert (np.abs(every_row - expected) <= most * size).all(), weights.shape
        for m in ROWS:
            np.testing.assert_array_equal(native_tiles(kind, "exact", x[:m], blocks), every_row[:m])


@pytest.mark.parametrize("kind", some(("q4_1",)))
def test_code_for_any_vector_width_gives_the_same_bits(kind):
    """But for `exact` with numbers of eight bits between digits of 8 and of 12 bits: their sums do not fit 32 bits, and are
    put together in float32."""
    host = host_target()
    of_words = [by_pairs(SimpleNamespace(target=host), min(tiles.ROWS, lanes)) for lanes in (host.lanes, 4, 8, 16)]
    for x, blocks, weights in tiled_cases(kind):
        size = np.abs(x[:13]) @ np.abs(weights).T
        for precision in ("exact", "fast"):
            here = native_tiles(kind, precision, x[:13], blocks)
            for lanes, words in zip((4, 8, 16), of_words[1:], strict=True):
                found = native_tiles(kind, precision, x[:13], blocks, lanes)
                if kind in ROUNDED and precision == "exact" and words != of_words[0]:
                    assert (np.abs(found - here) <= 1e-7 * size).all()
                else:
                    np.testing.assert_array_equal(found, here)


@pytest.mark.parametrize("kind", some(SAMPLE))
def test_fast_tiles_are_exact_but_for_the_rounding_of_activations(kind):
    """Equal to a matmul of activations rounded to 8 bits in blocks of 32, of 16 bits for 8-bit weights."""
    for x, blocks, weights in tiled_cases(kind):
        x[1] = 0.0
        grouped = x.reshape(len(x), -1, 32)
        scale = np.abs(grouped).max(-1, keepdims=True) / np.float32(127)
        rounded = np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale > 0).round() * scale.astype(float)
        expected = rounded.reshape(x.shape) if cpu.digits(kind, "fast") == 1 else x
        # A quotient next to a half may go to either side: one number may be one step off.
        tolerance = 1e-6 * (np.abs(x) @ np.abs(weights).T) + scale.max() * np.abs(weights).max()
        every_row = native_tiles(kind, "fast", x, blocks)
        assert (np.abs(every_row - expected @ weights.T) <= tolerance).all(), weights.shape
        for m in ROWS:
            np.testing.assert_array_equal(native_tiles(kind, "fast", x[:m], blocks), every_row[:m])


@pytest.mark.parametrize("kind", some(("q4_k", "iq4_nl")))
@pytest.mark.parametrize("cpu_name", CPUS)
def test_every_cpu_has_its_byte_products(kind, cpu_name):
    """The code is made and read, not run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target, instruction, register = CPUS[cpu_name]
    lines = emit_assembly(cpu.tiles_kernel(kind, "fast").build(target), target).splitlines()
    wide = kind in ROUNDED and instruction == "vpmaddubsw"  # sums of two products of its bytes need 32 bits
    instruction = "vpmaddwd" if wide else instruction
    found = [line for line in lines if instruction in line.split()[:2] and register in line]
    # A loop for eight rows and for four, two and one: eight products a row, or twice as many for numbers of eight bits.
    products = 8 * (8 + 4 + 2 + 1) * (2 if kind == "q4_k" else 1)
    assert len(found) >= products * (2 if kind == "iq4_nl" and instruction != "vpdpbusd" else 1)
    tiles_of_sums = cpu.digits(kind, "fast") * (2 if KINDS[kind].halves else 1)
    by_amx = [line for line in lines if line.split()[:1] == ["tdpbsud"]]
    assert len(by_amx) == (tiles_of_sums if cpu_name == "amx" else 0)


def test_tiles_pass_on_what_is_not_finite():
    x, blocks = random_rows(3, 64), random_blocks("q4_1", 2, 16, 64)
    x[0, 3], x[2, 40] = np.inf, np.nan
    for precision in PRECISIONS:
        finite = np.isfinite(native_tiles("q4_1", precision, x, blocks)).all(axis=1)
        assert finite.tolist() == [False, True, False]


@pytest.mark.parametrize("gate", [0.0, -200.0, 200.0, np.inf, -np.inf, np.nan])
def test_gates_of_any_size(gate):
    """silu of what is not finite: infinity and -infinity · 0 are not numbers, and only their own row knows of them."""
    x, tiled = np.ones((2, 64), np.float32), random_blocks("q4_1", 2, 16, 64)
    gates = np.ones_like(x)
    gates[1] = gate
    plain = quant_matmul(x, jnp.asarray(tiled), 1, jnp.ones_like(x), kind="q4_1", tiled=True, implementation="cpu")
    out = np.asarray(quant_matmul(x, jnp.asarray(tiled), 1, gates, kind="q4_1", tiled=True, implementation="cpu"))
    np.testing.assert_array_equal(out[0], plain[0])
    if np.isfinite(gate):
        expected = quant_matmul(x, jnp.asarray(tiled), 1, gates, kind="q4_1", tiled=True, implementation="reference")
        np.testing.assert_allclose(out[1], np.asarray(expected)[1], rtol=1e-4, atol=1e-5)
    else:
        assert np.isnan(out[1]).all()


@pytest.mark.parametrize("kind", some(("q4_1", "q6_k")))
def test_norms_are_computed_where_activations_are_rounded(kind):
    x, blocks = random_rows(9, 512), random_blocks(kind, 2, 48, 512)
    tiled = blocks.copy()
    tiles.tile_rows(tiled, kind)
    weight = jnp.asarray(random_rows(3, 512))
    for layer, eps in ((1, 1e-5), (2, 1.0)):
        norm = Norm(weight, layer, eps)
        expected = quant_matmul(x, jnp.asarray(blocks), 1, norm=norm, kind=kind, implementation="reference")
        options = dict(kind=kind, tiled=True, implementation="cpu")
        out = np.asarray(quant_matmul(x, jnp.asarray(tiled), 1, norm=norm, **options))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        alone = quant_matmul(x[3:4], jnp.asarray(tiled), 1, norm=norm, **options)
        np.testing.assert_array_equal(np.asarray(alone)[0], out[3])


def test_norms_of_other_shapes_are_refused():
    x, blocks = jnp.ones((2, 64)), jnp.asarray(random_blocks("q4_1", 2, 16, 64))
    for norm, gate in ((Norm(jnp.ones((1, 32)), 0, 0.0), None), (Norm(jnp.ones((1, 64)), 0, 0.0), x)):
        with pytest.raises(ValueError, match="norm"):
            quant_matmul(x, blocks, 0, gate, norm, kind="q4_1")
    with pytest.raises(ValueError, match="layer"):
        quant_matmul(x, blocks, 0, norm=Norm(jnp.ones((1, 64)), 1, 0.0), kind="q4_1")
