"""Causal convolution the obvious way, the oracle of the others: a sequence's state and rows in one line, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv import StateRows
from pallas_kernels.dispatch import Case


def why_not(case: Case) -> str | None:
    """Takes every case, but works for each sequence on all rows, so it is for tests."""
    del case
    return None


def causal_conv(
    x: jax.Array, taps: jax.Array, states: jax.Array, rows: StateRows, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Convolves, see `pallas_kernels.causal_conv.causal_conv`."""
    kept, out, new_states = states.shape[2], jnp.zeros(x.shape, jnp.float32), states
    for sequence in range(rows.state_from.shape[0]):
        first, last = rows.q_start[sequence], rows.q_start[sequence + 1]
        source, target = rows.state_from[sequence], rows.state_to[sequence]
        state = jnp.where(source > 0, states[layer, source], 0).astype(x.dtype)
        # The sequence's rows at the front of a copy of all rows, its state before them.
        line = jnp.concatenate([state, jnp.roll(x, -first, axis=0)]).astype(jnp.float32)
        windows = jnp.stack([line[k : k + x.shape[0]] for k in range(kept + 1)], axis=-1)
        found = jnp.roll(jnp.sum(windows * taps.astype(jnp.float32)[None], axis=-1), first, axis=0)
        row = jnp.arange(x.shape[0], dtype=jnp.int32)
        out = jnp.where(((row >= first) & (row < last))[:, None], found, out)
        state = jax.lax.dynamic_slice_in_dim(line, rows.state_count[sequence], kept)
        new_states = new_states.at[layer, target].set(state.astype(states.dtype))
    return out.astype(x.dtype), new_states
