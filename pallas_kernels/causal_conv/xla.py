"""Causal convolution in plain XLA: each tap is a shifted copy of the rows, those before a sequence's first from its state."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv import StateRows
from pallas_kernels.dispatch import Case


def why_not(case: Case) -> str | None:
    """Takes every case: each number is a sum of K terms in their order, whatever else is in the batch."""
    del case
    return None


def causal_conv(
    x: jax.Array, taps: jax.Array, states: jax.Array, rows: StateRows, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Convolves, see `pallas_kernels.causal_conv.causal_conv`."""
    q_start, state_from, state_to, state_count = rows
    tokens, kept = x.shape[0], states.shape[2]
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = jnp.sum(token[:, None] >= q_start[None, 1:], axis=1, dtype=jnp.int32)  # past the last: padding
    owner = jnp.minimum(owner, state_from.shape[0] - 1)
    place = token - q_start[owner]
    before = states[layer, state_from].astype(x.dtype)
    before = jnp.where((state_from > 0)[:, None, None], before, 0)

    wide = taps.astype(jnp.float32)
    out = x.astype(jnp.float32) * wide[None, :, kept]
    for back in range(1, kept + 1):
        shifted = jnp.pad(x, ((back, 0), (0, 0)))[:tokens]
        own = before[owner, jnp.clip(kept + place - back, 0, kept - 1)]
        seen = jnp.where((place >= back)[:, None], shifted, own)
        out = out + seen.astype(jnp.float32) * wide[None, :, kept - back]

    at = state_count[:, None] + jnp.arange(-kept, 0, dtype=jnp.int32)[None]  # of the inputs that are kept, oldest first
    new = x[jnp.clip(q_start[:-1, None] + at, 0, tokens - 1)]
    old = jnp.take_along_axis(before, jnp.clip(kept + at, 0, kept - 1)[:, :, None], axis=1)
    new = jnp.where((at >= 0)[:, :, None], new, old)
    return out.astype(x.dtype), states.at[layer, state_to].set(new.astype(states.dtype))
