"""Gradients through quantised matmul are those of the dense product with dequantised weights, for every implementation."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import cpu_ffi, dispatch
from pallas_kernels.quant_matmul import Norm, quant_matmul, reference, switched_matmul, tiles
from pallas_kernels.quant_matmul.cases import random_blocks, random_rows

HAS_NATIVE = cpu_ffi.why_not() is None
IMPLEMENTATIONS = ["xla", *(["cpu"] if HAS_NATIVE else [])]
native = pytest.mark.skipif(not HAS_NATIVE, reason=f"native CPU kernels: {cpu_ffi.why_not()}")
LAYERS, WIDTH, ROWS = 3, 256, 3
PLAIN = ("q4_0", "q4_1", "q4_k", "q6_k", "q8_0", "f32", "bf16")
TILED = ("q4_1", "q5_0")
CASES = [
    *(("xla", kind, tiled) for kind, tiled in (("q4_1", False), ("f32", False))),
    *(("cpu", kind, False) for kind in PLAIN if HAS_NATIVE),
    *(("cpu", kind, True) for kind in TILED if HAS_NATIVE),
]
SIZES = {"q4_k": 2e-4, "q6_k": 1e-4}  # of scales, so that weights of all kinds are about as large


def stack(kind: str, tiled: bool, rows: int = 16) -> tuple[jax.Array, jax.Array]:
    """Blocks [L, N, R] as the kernels take them, and their weights [L, N, K]."""
    blocks = random_blocks(kind, LAYERS, rows, WIDTH, size=SIZES.get(kind, 0.02))
    weights = reference.dequantise(jnp.asarray(blocks), kind)
    if tiled:
        tiles.tile_rows(blocks, kind)
    return jnp.asarray(blocks), weights


def dense(x, weights, layer, gate=None, norm=None):
    if norm is not None:
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + norm.eps)
        x = x * scale * norm.weight[norm.layer][None]
    x = x if gate is None else x * gate / (1 + jnp.exp(-gate))
    return jnp.matmul(x, weights[layer].T, precision="highest")


def loss(multiply, *arguments):
    return jnp.sum(jnp.sin(multiply(*arguments)))


def assert_same(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize(("implementation", "kind", "tiled"), CASES)
def test_of_activations_norms_and_dense_weights(implementation, kind, tiled) -> None:
    """Plain, with a gate and with a norm; the layer is known only when the program runs."""
    blocks, weights = stack(kind, tiled)
    x, gate = (jnp.asarray(random_rows(ROWS, WIDTH, seed)) for seed in (0, 1))
    scales = 1 + jnp.asarray(random_rows(LAYERS, WIDTH, 2)) / 10
    multiply = partial(quant_matmul, kind=kind, tiled=tiled, implementation=implementation)

    def total(of, weights, x, gate, scales, layer):
        plain = loss(of, x / 9, weights, layer)
        gated = loss(of, x / 9, weights, layer, gate)
        return plain + gated + loss(of, x, weights, layer, None, Norm(scales / 9, layer, 1e-5))

    has_gradient = blocks.dtype != jnp.uint8
    (found, expected) = (
        jax.jit(jax.grad(partial(total, of), (1, 2, 3, 0)[: 3 + has_gradient]))(stored, x, gate, scales, jnp.int32(1))
        for of, stored in ((multiply, blocks), (dense, weights))
    )
    assert_same(found[:3], expected[:3])
    assert not np.asarray(found[2])[[0, 2]].any()
    if has_gradient:
        assert found[3].dtype == blocks.dtype and not np.asarray(found[3], np.float32)[[0, 2]].any()
        assert_same(found[3], expected[3], 1e-5 if kind == "f32" else 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_all_arguments_and_none_for_integers(implementation) -> None:
    blocks, _ = stack("q4_1", False)
    x, scales = jnp.asarray(random_rows(ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH))

    def total(x, blocks, layer, norm):
        return loss(partial(quant_matmul, kind="q4_1", implementation=implementation), x, blocks, layer, None, norm)

    norm = Norm(scales, jnp.int32(2), jnp.float32(1e-5))
    gradient = jax.jit(jax.grad(total, (0, 1, 2, 3), allow_int=True))
    to_x, to_blocks, to_layer, to_norm = gradient(x, blocks, jnp.int32(1), norm)
    assert to_blocks.dtype == to_layer.dtype == to_norm.layer.dtype == jax.dtypes.float0
    assert to_blocks.shape == blocks.shape and to_x.shape == x.shape
    assert np.flatnonzero(np.abs(np.asarray(to_norm.weight)).max(-1)).tolist() == [2] and to_norm.eps.shape == ()


@native
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("precision", ["fine", "fast"])
def test_of_rounded_activations_are_as_if_exact(precision, tiled) -> None:
    blocks, weights = stack("q4_0", tiled)
    x, aim = jnp.asarray(random_rows(ROWS, WIDTH)), jnp.asarray(random_rows(ROWS, 16))

    def multiply(x):
        return quant_matmul(x, blocks, 1, kind="q4_0", precision=precision, tiled=tiled, implementation="cpu")

    found = jax.grad(lambda x: jnp.sum(multiply(x) * aim))(x)
    assert_same(found, aim @ weights[1])


@pytest.mark.parametrize(("remat", "implementation"), [(False, "xla"), (True, IMPLEMENTATIONS[-1])])
def test_in_a_loop_over_layers(remat, implementation) -> None:
    """Layers of two kinds in a scan. No weights of all layers are copied for each of them."""
    first, first_weights = stack("q4_k", True, WIDTH)
    second, second_weights = stack("f32", False, WIDTH)
    x, scales = jnp.asarray(random_rows(ROWS, WIDTH)), 1 + jnp.asarray(random_rows(2 * LAYERS, WIDTH, 2)) / 10
    second, second_weights = second / 30, second_weights / 30

    def through(of, x, scales, second):
        def layer(x, number):
            return x + jnp.tanh(of(x, number, Norm(scales, number, 1e-5), second)), None

        layer = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, jnp.arange(2 * LAYERS, dtype=jnp.int32))[0]))

    def switched(x, number, norm, second):
        kinds, tiled = ("q4_k", "f32"), (True, False)
        return switched_matmul(
            x,
            (first, second),
            number % 2,
            number // 2,
            norm=norm,
            kinds=kinds,
            tiled=tiled,
            implementation=implementation,
        )

    def branches(x, number, norm, second):
        return jax.lax.switch(
            number % 2,
            [
                partial(quant_matmul, kind="q4_k", tiled=True, implementation=implementation),
                lambda x, _, *rest: quant_matmul(x, second, *rest, kind="f32", implementation=implementation),
            ],
            x, first, number // 2, None, norm,
        )  # fmt: skip

    def plain(x, number, norm, second):
        every = jnp.stack([first_weights, second], axis=1).reshape(2 * LAYERS, WIDTH, WIDTH)
        return dense(x, every, number, None, norm)

    ways = (plain, switched) if remat else (plain, switched, branches)
    gradients = {of: jax.jit(jax.value_and_grad(partial(through, of), (0, 1, 2))) for of in ways}
    expected = gradients.pop(plain)(x, scales, second_weights)
    for gradient in gradients.values():
        assert_same(gradient(x, scales, second), expected, 2e-5)
    program = gradients[switched].lower(x, scales, second).compile().as_text()
    sizes = {np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"u8\[([\d,]+)\]", program)}
    assert max(sizes) == first.size


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("kind", "tiled"), [("q4_1", True), ("bf16", False)])
def test_the_forward_program_is_the_implementations_own(kind, tiled, implementation) -> None:
    blocks, _ = stack(kind, tiled)
    x, norm = jnp.asarray(random_rows(ROWS, WIDTH)), Norm(jnp.ones((LAYERS, WIDTH)), jnp.int32(1), 1e-5)
    own = dispatch.implementation("quant_matmul", implementation)
    layer = jnp.int32(2)

    def program(function):
        text = jax.jit(function).lower(x, blocks).compile().as_text()
        text = re.sub(r", metadata=\{[^}]*\}|, frontend_attributes=\{[^}]*\}", "", text)
        text = text.split("FileNames")[0]  # where the lines of the source are listed
        return text.replace("jit_through", "jit_").replace("jit_alone", "jit_")

    def through(x, blocks):
        return quant_matmul(x, blocks, layer, norm=norm, kind=kind, tiled=tiled, implementation=implementation)

    def alone(x, blocks):
        return own(x, blocks, layer, None, norm, kind=kind, tiled=tiled)

    np.testing.assert_array_equal(jax.jit(through)(x, blocks), jax.jit(alone)(x, blocks))
    assert program(through) == program(alone)


def test_under_shard_map() -> None:
    blocks, weights = stack("f32", False)
    x, norm = jnp.asarray(random_rows(ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("dp", "tp"))

    def body(x, blocks, norm):
        return quant_matmul(x, blocks, 1, norm=Norm(norm, 1, 1e-5), kind="f32")

    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=(P("dp"), P(None, "tp"), P()), out_specs=P("dp", "tp"), check_vma=False
    )
    found = jax.jit(jax.grad(partial(loss, sharded), (0, 1, 2)))(x / 9, blocks, norm / 9)
    plain = partial(loss, lambda x, weights, norm: dense(x, weights, 1, None, Norm(norm, 1, 1e-5)))
    assert_same(found, jax.jit(jax.grad(plain, (0, 1, 2)))(x / 9, weights, norm / 9))


def test_stacks_that_do_not_fit_are_refused() -> None:
    x, blocks = jnp.zeros((2, WIDTH)), stack("q8_0", False)[0]
    with pytest.raises(ValueError, match="2 stacks, 1 kinds, 2 tiled"):
        switched_matmul(x, (blocks, blocks), jnp.int32(0), jnp.int32(0), kinds=("q8_0",))
    with pytest.raises(ValueError, match="stacks: expected N=16 rows in each"):
        switched_matmul(x, (blocks, blocks[:, :5]), jnp.int32(0), jnp.int32(0), kinds=("q8_0",) * 2)
