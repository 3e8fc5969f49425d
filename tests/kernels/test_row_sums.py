"""row_sums: its implementations agree with float64, and natively a row has the same bits in any array."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_ffi
from pallas_kernels.row_sums import KINDS, logsumexp, row_sums, softmax

HAS_NATIVE = cpu_ffi.why_not() is None
IMPLEMENTATIONS = ["xla", *(["cpu"] if HAS_NATIVE else [])]
native = pytest.mark.skipif(not HAS_NATIVE, reason=f"native CPU kernels: {cpu_ffi.why_not()}")
OF = {"values": lambda x: x, "squares": np.square, "exps": np.exp, "above": lambda x: (x > 0).astype(float)}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) * 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums(implementation: str, kind: str) -> None:
    for features in (1, 15, 16, 63, 64, 80, 131, 1000):
        x, shift = numbers(2, 5, features), numbers(2, 5)
        found = row_sums(jnp.asarray(x), jnp.asarray(shift), kind=kind, implementation=implementation)
        expected = OF[kind](x.astype(float) - shift[..., None].astype(float))
        bound = 1e-6 * np.abs(expected).sum(-1) + 1e-6
        assert found.shape == (2, 5) and (np.abs(found - expected.sum(-1)) <= bound).all()


@native
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_array(kind: str) -> None:
    sums = jax.jit(partial(row_sums, kind=kind, implementation="cpu"))
    for features in (8, 64, 576, 2880):
        x = jnp.asarray(numbers(600, features) / 3)
        whole = np.asarray(sums(x))
        for rows in (1, 2, 3, 7, 16, 50, 599):
            np.testing.assert_array_equal(sums(x[:rows]), whole[:rows])
            np.testing.assert_array_equal(sums(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_batches(implementation: str, kind: str) -> None:
    x, shift = jnp.asarray(numbers(3, 4, 40) / 3), jnp.asarray(numbers(3, 4) / 3)
    sums = partial(row_sums, kind=kind, implementation=implementation)
    plain = partial(row_sums, kind=kind, implementation="xla")

    def total(of, x, shift):
        return jnp.sum(jnp.sin(of(x, shift) / 40))

    found, expected = (jax.grad(partial(total, of), (0, 1))(x, shift) for of in (sums, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(jax.vmap(sums)(x, shift), sums(x, shift))
    np.testing.assert_array_equal(jax.vmap(sums, (0, None))(x, shift[0])[1], sums(x[1], shift[0]))


def test_log_sum_exp_and_softmax() -> None:
    x = numbers(3, 50) * 5
    x[0, :7] = -np.inf
    np.testing.assert_allclose(logsumexp(jnp.asarray(x)), jax.scipy.special.logsumexp(x, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(softmax(jnp.asarray(x)), jax.nn.softmax(x), rtol=1e-5, atol=1e-9)


def test_wrong_arguments() -> None:
    x = jnp.zeros((3, 4))
    for message, call in {
        "kind is 'cubes'": lambda: row_sums(x, kind="cubes"),
        "x.*float32": lambda: row_sums(x.astype(jnp.bfloat16)),
        "shift.*3": lambda: row_sums(x, jnp.zeros(4)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
