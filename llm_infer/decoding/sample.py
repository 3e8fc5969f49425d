"""The sampler of a step: one jittable function that serves a batch in which every row has its own parameters.

A row's random number comes from its seed and its token's place alone, so a text does not depend on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.draw_tokens import Limits, draw_tokens, limited


class SamplingRows(NamedTuple):
    """Parameters of each row, all [S]: those of `Limits`, and those that its random number comes from.

    `seed_high`, `seed_low` are the words of the 64-bit seed; `position` is the place of the drawn token in its sequence.
    """

    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    top_k: Int[Array, " S"]
    min_p: Float[Array, " S"]
    typical_p: Float[Array, " S"]
    seed_high: Int[Array, " S"]
    seed_low: Int[Array, " S"]
    sample_index: Int[Array, " S"]
    position: Int[Array, " S"]


def uniforms(rows: SamplingRows) -> Float[Array, " S"]:
    """Returns one number in [0, 1) per row, from the key `fold_in(fold_in(seed, sample_index), position)` alone."""

    def draw(high: Array, low: Array, index: Array, position: Array) -> Array:
        words = lax.bitcast_convert_type(jnp.stack((high, low)), jnp.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, index), position))

    return jax.vmap(draw)(rows.seed_high, rows.seed_low, rows.sample_index, rows.position)


def sample(logits: Float[Array, "S V"], rows: SamplingRows) -> Int[Array, " S"]:
    """Returns the next token of each row."""
    return draw_tokens(logits, _limits(rows), uniforms(rows))


def drawn_from(logits: Float[Array, "S V"], rows: SamplingRows) -> Float[Array, "S V"]:
    """Returns logits of the distribution that `sample` draws from, see `pallas_kernels.draw_tokens.limited`."""
    return limited(logits, _limits(rows))


def _limits(rows: SamplingRows) -> Limits:
    return Limits(*(getattr(rows, name) for name in Limits._fields))
