"""Draws tokens from logits, each row with a key and parameters of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.draw_tokens import Limits, draw_tokens


def draw(
    logits: Float[Array, "S V"],
    keys: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: Array | int = -1,
    top_p: Array | float = 1.0,
    min_p: Array | float = 0.0,
    typical_p: Array | float = 1.0,
) -> Int[Array, " S"]:
    """Draws the next token of each row; a parameter is one number for all rows or an array [S].

    Args:
        logits: from `decode_step` or `forward`.
        keys: [S] keys of `jax.random`; a row's token depends on its own key, logits and parameters alone.
        temperature, top_k, top_p, min_p, typical_p: as of `SamplingParams`; temperature 0 takes the most likely token.
    """
    rows = logits.shape[0]
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "typical_p": typical_p}
    types = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in given}
    limits = {name: jnp.broadcast_to(jnp.asarray(value, types[name]), (rows,)) for name, value in given.items()}
    return draw_tokens(logits, Limits(**limits), jax.vmap(jax.random.uniform)(keys))
