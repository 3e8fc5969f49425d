"""Draws tokens from logits, each row with a key and parameters of its own, and says from which distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.draw_tokens import Limits, draw_tokens, limited


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
    _require_rows(logits)
    if keys.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"keys has the shape {list(keys.shape)}, expected a key for each of {logits.shape[0]} rows (split one)"
        )
    limits = _limits(logits.shape[0], temperature, top_k, top_p, min_p, typical_p)
    return draw_tokens(logits, limits, jax.vmap(jax.random.uniform)(keys))


def sampling_logits(
    logits: Float[Array, "S V"],
    *,
    temperature: Array | float = 1.0,
    top_k: Array | int = -1,
    top_p: Array | float = 1.0,
    min_p: Array | float = 0.0,
    typical_p: Array | float = 1.0,
) -> Float[Array, "S V"]:
    """Computes the logits of the distribution that `draw` draws from: -inf for tokens that limits leave out.

    Those that are kept are divided by the temperature, up to a number that is the same for a row. Which these are counts as
    fixed for the gradient. Arguments are those of `draw`; a row with temperature 0, of which nothing is drawn, stays as it is.
    """
    _require_rows(logits)
    return limited(logits, _limits(logits.shape[0], temperature, top_k, top_p, min_p, typical_p))


def _limits(rows: int, *given: Array | float) -> Limits:
    """Makes the limits of each row out of numbers for all or arrays [S], in the order of `draw`'s arguments."""
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    types = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in names}
    pairs = zip(names, given, strict=True)
    return Limits(**{name: jnp.broadcast_to(jnp.asarray(value, types[name]), (rows,)) for name, value in pairs})


def _require_rows(logits: Array) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits has the shape {list(logits.shape)}, expected [S, V]: reshape it, or use vmap")
