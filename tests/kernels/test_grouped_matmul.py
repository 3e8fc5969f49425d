"""Grouped matmul: the reference against numpy, every other implementation against the reference, and refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import gpu_triton, grouped_matmul
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
