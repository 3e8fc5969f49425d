"""Every op under `jax.vmap` gives what a loop over the batch does; natively to the bit, and rows in one call."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_ffi, dispatch
from pallas_kernels.causal_conv import StateRows, causal_conv
from pallas_kernels.causal_conv.cases import CASES as CONV_CASES
from pallas_kernels.causal_conv.cases import build as build_conv
from pallas_kernels.draw_tokens import draw_tokens
from pallas_kernels.draw_tokens.cases import random_limits, random_logits
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.paged_attention import copy_pages, paged_attention
from pallas_kernels.paged_attention.cases import CASES, build
from pallas_kernels.paged_attention.pages import turn_keys
from pallas_kernels.quant_matmul import Norm, quant_matmul
from pallas_kernels.quant_matmul.cases import random_blocks, random_rows
from pallas_kernels.quant_matmul.tiles import tile_rows
from pallas_kernels.row_sums import row_sums
from pallas_kernels.scaled_matmul import scaled_matmul

HAS_NATIVE = cpu_ffi.why_not() is None
native = pytest.mark.skipif(not HAS_NATIVE, reason=f"native CPU kernels: {cpu_ffi.why_not()}")
BATCH, ROWS, WIDTH, LAYERS = 3, 2, 64, 2


def batch_of(make, size: int = BATCH):
    """Stacks what `make(seed)` returns, a pytree of arrays."""
    return jax.tree.map(lambda *each: jnp.stack([jnp.asarray(one) for one in each]), *map(make, range(size)))


def q4_blocks(tiled: bool = False, seed: int = 0) -> jax.Array:
    blocks = random_blocks("q4_1", LAYERS, 32, WIDTH, seed)
    if tiled:
        tile_rows(blocks, "q4_1")
    return jnp.asarray(blocks)


def loop(function, axes, arguments):
    """What `jax.vmap(function, axes)` should give."""

    def member(i):
        return [x if axis is None else jax.tree.map(lambda y: y[i], x) for x, axis in zip(arguments, axes, strict=True)]

    return batch_of(lambda i: function(*member(i)))


def check(function, axes, *arguments, exact=HAS_NATIVE):
    found = jax.jit(jax.vmap(function, axes))(*arguments)
    expected = loop(jax.jit(function), axes, arguments)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(np.asarray(other, np.float32)).all()
        if exact:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def op_calls():
    """Each op of the table: a function of arrays, and arguments of a batch."""
    blocks = q4_blocks()
    rng, inputs = np.random.default_rng(0), build(CASES["mixed"])
    weights = jnp.asarray(rng.standard_normal((1, 12, WIDTH)), jnp.float32)
    stored = jnp.asarray(rng.integers(-99, 99, (1, 12, WIDTH)), jnp.int8)
    rows = batch_of(lambda seed: random_rows(4, WIDTH, seed))
    pages = jnp.asarray(np.nan_to_num(turn_keys(inputs.pages)))
    turned = batch_of(lambda seed: pages + seed)
    tokens = batch_of(lambda seed: (inputs.q * (1 + seed), inputs.k_new + seed, inputs.v_new - seed))
    draws = batch_of(lambda seed: random_logits(np.random.default_rng(seed), 8, 300))
    limits = batch_of(lambda seed: random_limits(np.random.default_rng(seed), 8, 300))
    places = jnp.arange(1, 5, dtype=jnp.int32)
    x, taps, states, fields = map(partial(jax.tree.map, jnp.asarray), build_conv(CONV_CASES["chunk"]))
    x, states = jnp.nan_to_num(x), jnp.nan_to_num(states)
    conv_rows = StateRows(**fields)
    return {
        "quant_matmul": (lambda x: quant_matmul(x, blocks, 1, kind="q4_1"), rows),
        "row_sums": (row_sums, rows),
        "draw_tokens": (draw_tokens, draws, limits, jnp.asarray(rng.random((BATCH, 8)), jnp.float32)),
        "grouped_matmul": (lambda x: grouped_matmul(x, weights, jnp.array([1, 0, 2], jnp.int32)), rows),
        "scaled_matmul": (lambda x: scaled_matmul(x, stored, jnp.ones((1, 12, 1))), rows),
        "paged_attention": (
            lambda new, pages: paged_attention(*new, pages, inputs.plan, layer=1, scale=inputs.scale),
            tokens,
            turned,
        ),
        "causal_conv": (
            lambda x, states: causal_conv(x, taps, states, conv_rows, 1),
            batch_of(lambda seed: x + seed),
            batch_of(lambda seed: states - seed),
        ),
        "copy_pages": (
            lambda pages, count: copy_pages(pages, places, places + 4, count),
            turned,
            jnp.array([4, 0, 2], jnp.int32),
        ),
    }


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_a_batch_is_a_loop(op) -> None:
    function, *arguments = op_calls()[op]
    check(
        function, [0] * len(arguments), *arguments, exact=HAS_NATIVE and op not in ("grouped_matmul", "scaled_matmul")
    )


@native
@pytest.mark.parametrize(("tiled", "precision"), [(False, "exact"), (False, "fast"), (True, "exact")])
def test_products_of_any_batched_arguments(tiled, precision) -> None:
    multiply = partial(quant_matmul, kind="q4_1", tiled=tiled, precision=precision, implementation="cpu")
    x, gate = (batch_of(partial(random_rows, ROWS, WIDTH)) + number for number in (0, 1))
    blocks = batch_of(lambda seed: q4_blocks(tiled, seed))
    scales = batch_of(lambda seed: random_rows(LAYERS, WIDTH, seed + 5))
    layers, one = jnp.array([1, 0, 1], jnp.int32), jnp.int32(1)
    check(multiply, (0, None, None), x, blocks[0], one)
    check(multiply, (0, None, None, 0), x, blocks[0], one, gate)
    check(multiply, (None, None, None, 0), x[0], blocks[0], one, gate)
    check(multiply, (0, 0, 0, None), x, blocks, layers, gate[0])

    def normed(x, blocks, layer, scales):
        return multiply(x, blocks, layer, None, Norm(scales, layer, 1e-5))

    check(normed, (0, None, None, None), x, blocks[0], one, scales[0])
    check(normed, (None, None, 0, 0), x[0], blocks[0], layers, scales)


@native
def test_rows_of_a_batch_are_one_call() -> None:
    blocks = q4_blocks()
    x = batch_of(lambda _: batch_of(lambda seed: random_rows(ROWS, WIDTH, seed)), 2)
    for tiled in (False, True):
        multiply = partial(quant_matmul, blocks=blocks, layer=1, kind="q4_1", tiled=tiled, implementation="cpu")
        program = str(jax.make_jaxpr(jax.vmap(jax.vmap(multiply)))(x))
        assert program.count("ffi_call[") == 1 and "scan[" not in program
    function, *arguments = op_calls()["draw_tokens"]
    program = str(jax.make_jaxpr(jax.vmap(function))(*arguments))
    assert program.count("ffi_call[") == 1 and "scan[" not in program


def test_gradients_of_batches_and_batches_of_gradients() -> None:
    blocks = q4_blocks()
    dense = jnp.asarray(random_blocks("f32", LAYERS, 4, WIDTH))
    x, scales = batch_of(lambda seed: random_rows(ROWS, WIDTH, seed)), jnp.ones((LAYERS, WIDTH))

    def loss(x, scales, dense):
        out = quant_matmul(x, blocks, 1, None, Norm(scales, 1, 1e-5), kind="q4_1")
        total = jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(quant_matmul(x, dense, 0, x, kind="f32")))
        return total + jnp.sum(jnp.sin(row_sums(x, kind="squares") / 9))

    axes, each = (0, None, None), (0, 1, 2)
    check(jax.grad(loss, each), axes, x, scales, dense, exact=False)

    def mean(x, scales, dense):
        return jnp.sum(jax.vmap(loss, axes)(x, scales, dense))

    found = jax.jit(jax.grad(mean, each))(x, scales, dense)
    own = jax.jit(jax.vmap(jax.grad(loss, each), axes))(x, scales, dense)
    for one, other in zip(found, (own[0], own[1].sum(0), own[2].sum(0)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
