"""Grouped matmul: the reference against numpy, every other implementation against the reference, and refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import gpu_triton, gradients, grouped_matmul
from pallas_kernels.grouped_matmul.cases import CASES, LAYER, build


def run(name: str, implementation: str) -> np.ndarray:
    x, weights, sizes = build(CASES[name])
    call = jax.jit(grouped_matmul, static_argnames="implementation")
    return np.asarray(call(x, weights, sizes, jnp.int32(LAYER), implementation=implementation))


@pytest.mark.parametrize("name", CASES)
def test_reference_is_one_product_per_expert(name):
    case, (x, weights, sizes) = CASES[name], build(CASES[name])
    matrices = weights[LAYER].astype(np.float64).reshape(len(sizes), case.features, case.width)
    expected, row = np.zeros((case.rows, case.features)), 0
    for expert, size in enumerate(sizes):
        expected[row : row + size] = x[row : row + size].astype(np.float64) @ matrices[expert].T
        row += size
    tolerance = 2e-2 if case.dtype == "bfloat16" else 1e-5
    found = run(name, "reference")
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_ragged_dot_matches_the_reference(name):
    found, expected = run(name, "ragged"), run(name, "reference")
    tolerance = 2e-2 if CASES[name].dtype == "bfloat16" else 1e-5
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_gpu_kernel_matches_the_reference(name):
    x, weights, sizes = build(CASES[name])
    call = jax.jit(functools.partial(gpu_triton.grouped_matmul, interpret=True))
    found, expected = np.asarray(call(x, weights, sizes, jnp.int32(LAYER))), run(name, "reference")
    tolerance = 2e-2 if CASES[name].dtype == "bfloat16" else 1e-5
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=jnp.zeros((4, 3), jnp.int32)), r"x: expected floats of shape \[M, K\]"),
        (dict(weights=jnp.zeros((1, 5, 3))), r"weights: expected \[L, X\*N, K\] with X=2 and K=3"),
        (dict(weights=jnp.zeros((1, 4, 3), jnp.float16)), "weights: expected float32 or bfloat16"),
        (dict(group_sizes=jnp.zeros((2, 1), jnp.int32)), r"group_sizes: expected int32 of shape \[X\]"),
        (dict(layer=-1), "layer: expected 0 … 0, found -1"),
        (dict(layer=jnp.float32(0)), "layer: expected a scalar integer, found float32"),
        (dict(implementation="fast"), "no such implementation, choose from"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    legal = dict(x=jnp.zeros((4, 3)), weights=jnp.zeros((1, 4, 3)), group_sizes=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{**legal, **changes})


@pytest.mark.parametrize("implementation", ["ragged", "reference", "gpu_triton"])
@pytest.mark.parametrize("name", ["uneven_and_empty", "padding_rows", "bfloat16"])
def test_gradients_are_those_of_one_product_per_expert(name, implementation):
    case, (x, weights, sizes) = CASES[name], build(CASES[name])
    ends = np.cumsum(sizes)
    aim = jnp.asarray(np.random.default_rng(1).standard_normal((case.rows, case.features)), jnp.float32)

    def multiply(x, weights, layer):
        if implementation == "gpu_triton":
            run = functools.partial(gpu_triton.grouped_matmul, interpret=True)
            return gradients.differentiable(run, x, weights, jnp.asarray(sizes), layer)
        return grouped_matmul(x, weights, jnp.asarray(sizes), layer, implementation=implementation)

    def loss(x, weights, layer):
        return jnp.sum(multiply(x, weights, layer).astype(jnp.float32) * aim)

    found = jax.jit(jax.grad(loss, (0, 1)))(x, weights, jnp.int32(LAYER))
    to_x, to_weights = np.zeros(x.shape), np.zeros(weights.shape)
    matrices = weights.astype(np.float64).reshape(*weights.shape[:1], len(sizes), case.features, case.width)
    for expert, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        part = np.asarray(aim[begin:end], np.float64)
        to_x[begin:end] = part @ matrices[LAYER, expert]
        to_weights[LAYER, expert * case.features : (expert + 1) * case.features] = part.T @ x[begin:end]
    tolerance = 2e-2 if case.dtype == "bfloat16" else 1e-5
    for one, other, like in zip(found, (to_x, to_weights), (x, weights), strict=True):
        assert one.dtype == like.dtype
        assert np.abs(np.asarray(one, np.float64) - other).max() <= tolerance * np.abs(other).max()


def test_a_batch_is_computed_one_by_one():
    x, weights, sizes = build(CASES["uneven_and_empty"])
    xs, every = jnp.stack([x, x[::-1]]), jnp.stack([jnp.asarray(sizes), jnp.asarray(sizes[::-1])])

    def loss(x, sizes):
        return jnp.sum(jnp.sin(grouped_matmul(x, jnp.asarray(weights), sizes, LAYER)))

    for call in (lambda x, sizes: grouped_matmul(x, jnp.asarray(weights), sizes, LAYER), jax.grad(loss)):
        found = jax.vmap(call)(xs, every)
        np.testing.assert_allclose(found, [call(*each) for each in zip(xs, every, strict=True)], rtol=1e-5, atol=1e-6)
