"""Short causal convolutions over a ragged batch, each channel by itself, whose last inputs are kept for the next step: contract.

Axis letters: T tokens, S sequences, E channels, K taps, L layers, N states.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of, expect, layer_index

__all__ = ["StateRows", "causal_conv"]


class StateRows(NamedTuple):
    """Where the states of a step's sequences are, all int32.

    Shapes:
        q_start: [S + 1], the first row of each sequence and behind the last; sequences past the last have no rows.
        state_from: [S], the state before a sequence's rows; 0 stands for zeros.
        state_to: [S], where the state goes; 0, the null state, may hold anything.
        state_count: [S], rows from a sequence's first on that the new state takes in.
    """

    q_start: jax.Array
    state_from: jax.Array
    state_to: jax.Array
    state_count: jax.Array


def causal_conv(
    x: jax.Array,
    taps: jax.Array,
    states: jax.Array,
    rows: StateRows,
    layer: jax.Array | int,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolves each sequence's rows, those before them taken from its state, and writes its new state.

    out[t] is the sum over k of taps[:, k] · x[t - K + 1 + k], in float32. A state holds K - 1 inputs, the oldest first. Call it
    under jit with `states` donated. No sequence may write a state that another one reads in the same call, and no two the same
    one but the null state.

    Args:
        x: Float[Array, "T E"]. Rows past the last sequence's may hold anything.
        taps: Float[Array, "E K"], K at least 2.
        states: Float[Array, "L N K-1 E"], the states of all layers.
        rows: where each sequence's rows and states are.
        layer: Int32 scalar, may be traced; selects the layer of the states.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        out Float[Array, "T E"] in x's dtype, and the updated states.

    Raises:
        ValueError: at trace time, for shapes or dtypes other than these.
    """
    expect(x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating), "x", "floats of shape [T, E]", x)
    fits = taps.ndim == 2 and taps.shape[0] == x.shape[1] and taps.shape[1] >= 2
    expect(fits and jnp.issubdtype(taps.dtype, jnp.floating), "taps", f"floats [E={x.shape[1]}, K ≥ 2]", taps)
    held = (taps.shape[1] - 1, x.shape[1])
    expect(states.ndim == 4 and states.shape[2:] == held, "states", f"[L, N, K-1={held[0]}, E={held[1]}]", states)
    expect(jnp.issubdtype(states.dtype, jnp.floating), "states", "a floating dtype", states)
    sequences = rows.state_from.shape[0]
    for name, array in rows._asdict().items():
        shape = (sequences + (name == "q_start"),)
        expect(array.shape == shape and array.dtype == jnp.int32, f"rows.{name}", f"int32 {list(shape)}", array)
    index = layer_index(layer, states.shape[0])
    case = case_of({"x": x, "taps": taps, "states": states, **rows._asdict()})
    return dispatch.pick("causal_conv", case, implementation)(x, taps, states, rows, index)
