"""Causal convolution: the reference against numpy, every other implementation against the reference, and refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_ffi
from pallas_kernels.causal_conv import StateRows, causal_conv
from pallas_kernels.causal_conv.cases import CASES, LAYER, build
from tests.kernels.test_paged_attention import check_in_place

HAS_NATIVE = cpu_ffi.why_not() is None


def run(name: str, implementation: str | None) -> tuple[np.ndarray, np.ndarray]:
    x, taps, states, rows = build(CASES[name])
    call = jax.jit(causal_conv, static_argnames="implementation")
    arguments = *map(jnp.asarray, (x, taps, states)), StateRows(**{k: jnp.asarray(v) for k, v in rows.items()})
    out, states = call(*arguments, jnp.int32(LAYER), implementation=implementation)
    return np.asarray(out.astype(jnp.float32)), np.asarray(states.astype(jnp.float32))


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_each_sequence_is_one_line_of_state_and_rows(name: str, implementation: str) -> None:
    if implementation == "cpu" and not (HAS_NATIVE and CASES[name].dtype == "float32"):
        pytest.skip("for float32, with the native kernels")
    case, (x, taps, states, rows) = CASES[name], build(CASES[name])
    out, found = run(name, implementation)
    expected = states.astype(np.float32)
    kept = case.taps - 1
    for index, (count, source, target, taken) in enumerate(case.batch):
        first = rows["q_start"][index]
        before = states[LAYER, source].astype(float) if source else np.zeros((kept, case.channels))
        line = np.concatenate([before, x[first : first + count].astype(float)])
        for row in range(count):
            wanted = sum(line[row + k] * taps[:, k].astype(float) for k in range(case.taps))
            close = 1e-5 if case.dtype == "float32" else 2e-2
            np.testing.assert_allclose(out[first + row], wanted, rtol=close, atol=close)
        if target:
            expected[LAYER, target] = line[taken : taken + kept]
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])


@pytest.mark.parametrize("implementation", ["xla", *(["cpu"] if HAS_NATIVE else [])])
def test_a_row_is_the_same_whatever_else_is_in_the_batch(implementation: str) -> None:
    """Natively to the last bit; XLA may round a sum once or twice, as it chooses."""
    x, taps, states, rows = build(CASES["mixed"])
    out, _ = run("mixed", implementation)
    conv = jax.jit(causal_conv, static_argnames="implementation")
    for index, (count, source, target, _) in enumerate(CASES["mixed"].batch):
        first = rows["q_start"][index]
        alone = StateRows(*(jnp.asarray(each, jnp.int32) for each in ([0, count], [source], [target], [count])))
        arguments = x[first : first + count], taps, jnp.asarray(states), alone, jnp.int32(LAYER)
        found, _ = conv(*arguments, implementation=implementation)
        close = 0 if implementation == "cpu" else 1e-6
        np.testing.assert_allclose(found, out[first : first + count], rtol=close, atol=close)


@pytest.mark.parametrize("implementation", ["xla", *(["cpu"] if HAS_NATIVE else [])])
def test_states_are_updated_in_place(implementation: str) -> None:
    x, taps, states, rows = build(CASES["mixed"])
    big = jnp.zeros((4, 1000, *states.shape[2:]), jnp.float32)

    def step(states: jax.Array, x: jax.Array, taps: jax.Array, rows: StateRows) -> tuple[jax.Array, jax.Array]:
        def layer(states: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, states = causal_conv(x, taps, states, rows, index, implementation=implementation)
            return states, out

        return jax.lax.scan(layer, states, jnp.arange(4, dtype=jnp.int32))

    fields = StateRows(**{k: jnp.asarray(v) for k, v in rows.items()})
    check_in_place(jax.jit(step, donate_argnums=0).lower(big, x, taps, fields).compile(), big)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=jnp.zeros((4, 3), jnp.int32)), r"x: expected floats of shape \[T, E\]"),
        (dict(taps=jnp.zeros((3, 1))), r"taps: expected floats \[E=3, K ≥ 2\]"),
        (dict(states=jnp.zeros((1, 2, 3, 3))), r"states: expected \[L, N, K-1=1, E=3\]"),
        (dict(layer=1), "layer: expected 0 … 0, found 1"),
        (
            dict(rows=StateRows(*(jnp.zeros(2, jnp.int32) for _ in range(4)))),
            r"rows.q_start: expected int32 \[3\]",
        ),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    rows = StateRows(jnp.zeros(3, jnp.int32), *(jnp.zeros(2, jnp.int32) for _ in range(3)))
    legal = dict(x=jnp.zeros((4, 3)), taps=jnp.zeros((3, 2)), states=jnp.zeros((1, 2, 1, 3)), rows=rows, layer=0)
    with pytest.raises(ValueError, match=message):
        causal_conv(**{**legal, **changes})
