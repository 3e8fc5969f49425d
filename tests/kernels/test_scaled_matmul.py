"""Scaled matmul: every implementation against numpy, packing, quantising, and refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Case
from pallas_kernels.scaled_matmul import gpu_triton, pack_int4, quantise, scaled_matmul, unpack_int4

LAYERS, LAYER = 2, 1
KINDS = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")
# rows, K, N, groups, dtype of the activations
SIZES = [(1, 64, 48, 1, "float32"), (5, 128, 40, 4, "float32"), (33, 192, 64, 3, "bfloat16"), (2, 96, 33, 2, "float32")]


def build(kind: str, rows: int, width: int, features: int, groups: int, dtype: str):
    """Arguments, and the product in float64 of numbers that numpy unpacks and scales by itself."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, width)), dtype)
    weights, scales = quantise(jnp.asarray(rng.standard_normal((LAYERS, features, width)), jnp.float32), kind, groups)
    numbers = np.asarray(weights[LAYER])
    if kind == "int4":
        halves = numbers.reshape(features, groups, -1)
        numbers = np.concatenate([halves % 16, halves // 16], axis=-1).astype(np.float64).reshape(features, width) - 8
    full = numbers.astype(np.float64) * np.repeat(np.asarray(scales[LAYER], np.float64), width // groups, axis=1)
    return (x, weights, scales, jnp.int32(LAYER)), np.asarray(x, np.float64) @ full.T


def check(found: jax.Array, expected: np.ndarray) -> None:
    tolerance = 2e-2 if found.dtype == jnp.bfloat16 else 2e-5
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_implementations_multiply_scaled_weights(kind: str, sizes: tuple) -> None:
    arguments, expected = build(kind, *sizes)
    for implementation in ("reference", "xla"):
        call = jax.jit(functools.partial(scaled_matmul, implementation=implementation))
        check(call(*arguments), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES[1:3], ids=str)
def test_interpreted_gpu_kernel_multiplies_scaled_weights(kind: str, sizes: tuple) -> None:
    arguments, expected = build(kind, *sizes)
    check(jax.jit(functools.partial(gpu_triton.scaled_matmul, interpret=True))(*arguments), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_packing_is_undone(groups: int) -> None:
    weights = np.random.default_rng(0).integers(-8, 8, (2, 5, 48)).astype(np.int8)
    packed = pack_int4(jnp.asarray(weights), groups)
    assert packed.shape == (2, 5, 24) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(np.asarray(unpack_int4(packed, groups)), weights)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.005), ("int4", 0.08), ("float8_e4m3fn", 0.04)])
def test_quantising_keeps_the_largest_of_a_group(kind: str, error: float) -> None:
    """Half a step of the largest magnitude is the most that int8 and int4 are off; zeros stay zeros."""
    weights = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    weights[0] = 0
    stored, scales = quantise(jnp.asarray(weights), kind, 2)
    numbers = unpack_int4(stored, 2) if kind == "int4" else stored
    found = np.asarray(numbers, np.float32) * np.repeat(np.asarray(scales), 32, axis=1)
    largest = np.repeat(np.abs(weights).reshape(6, 2, 32).max(-1), 32, axis=1)
    assert (np.abs(found - weights) <= error * largest).all() and (found[0] == 0).all()
    with pytest.raises(ValueError, match="kind is 'int3', expected one of int8"):
        quantise(jnp.asarray(weights), "int3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=jnp.zeros((4, 32), jnp.int32)), r"x: expected floats of shape \[M, K\]"),
        (dict(weights=jnp.zeros((1, 8, 32))), "weights: expected a dtype of int8"),
        (dict(weights=jnp.zeros((1, 8, 31), jnp.int8)), r"weights: expected \[L, N, 32\] for K=32"),
        (dict(weights=jnp.zeros((1, 8, 32), jnp.uint8)), r"weights: expected \[L, N, 16\] for K=32"),
        (dict(scales=jnp.zeros((1, 7, 2))), r"scales: expected floats of shape \[L=1, N=8, B\]"),
        (dict(scales=jnp.zeros((1, 8, 5))), "scales: expected a number of groups that divides K=32"),
        (dict(layer=1), "layer: expected 0 … 0, found 1"),
        (dict(layer=0.0), "layer: expected an integer, found 0.0"),
        (dict(layer=jnp.zeros(1, jnp.int32)), r"layer: expected a scalar integer, found int32 of shape \[1\]"),
        (dict(implementation="fast"), "no such implementation, choose from"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str) -> None:
    legal = dict(x=jnp.zeros((4, 32)), weights=jnp.zeros((1, 8, 32), jnp.int8), scales=jnp.zeros((1, 8, 2)))
    with pytest.raises(ValueError, match=message):
        scaled_matmul(**{**legal, **changes})


@pytest.mark.parametrize(
    ("width", "groups", "dtype", "device", "reason"),
    [
        (4096, 32, "uint8", "NVIDIA H200", None),
        (4096, 1, "int8", "NVIDIA H200", "with one per output feature XLA fuses"),
        (96, 4, "int8", "NVIDIA H200", "found groups of 24"),
        (4096, 32, "float8_e4m3fn", "NVIDIA A100", "needs compute capability 8.9"),
    ],
)
def test_dispatch_says_when_the_gpu_kernel_runs(width, groups, dtype, device, reason) -> None:
    shapes = {"x": (8, width), "weights": (1, 64, width // (2 if dtype == "uint8" else 1)), "scales": (1, 64, groups)}
    case = Case("gpu", device, shapes, {"weights": dtype})
    said = gpu_triton.why_not(case)
    assert said is None if reason is None else reason in (said or "")
