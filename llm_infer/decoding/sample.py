"""The sampler of a step: one jittable function that serves a batch in which every row has its own parameters.

No sort and no draw over the whole vocabulary: top-k and top-p find their threshold by bisection over the bits of the
logits, and the draw inverts the cumulative distribution with one uniform number per row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 128
"""Tokens per block of the two-level cumulative sum."""


class SamplingRows(NamedTuple):
    """Parameters of each row, all [S].

    `temperature` 0 is greedy; `top_k` ≤ 0 keeps all; `seed_high`, `seed_low` are the words of the 64-bit seed;
    `position` is the place of the drawn token in its sequence.
    """

    temperature: Float[Array, "S"]
    top_p: Float[Array, "S"]
    top_k: Int[Array, "S"]
    seed_high: Int[Array, "S"]
    seed_low: Int[Array, "S"]
    sample_index: Int[Array, "S"]
    position: Int[Array, "S"]


def uniforms(rows: SamplingRows) -> Float[Array, "S"]:
    """One number in [0, 1) per row, from the key `fold_in(fold_in(seed, sample_index), position)` alone."""

    def draw(high: Array, low: Array, index: Array, position: Array) -> Array:
        words = lax.bitcast_convert_type(jnp.stack((high, low)), jnp.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, index), position))

    return jax.vmap(draw)(rows.seed_high, rows.seed_low, rows.sample_index, rows.position)


def ordered_bits(x: Float[Array, "S V"]) -> UInt32[Array, "S V"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def largest_threshold(
    keys: UInt32[Array, "S V"], weights: Float[Array, "S V"], target: Float[Array, "S"]
) -> UInt32[Array, "S"]:
    """Per row the largest threshold `t` with `sum(weights[keys >= t]) >= target`, by bisection over its bits."""

    def bit(i: Array, threshold: Array) -> Array:
        trial = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(keys >= trial[:, None], weights, 0.0), axis=-1)
        return jnp.where(mass >= target, trial, threshold)

    return lax.fori_loop(0, 32, bit, jnp.zeros(keys.shape[0], jnp.uint32))


def kept_tokens(scaled: Float[Array, "S V"], rows: SamplingRows) -> Bool[Array, "S V"]:
    """Tokens that top-k, and then top-p over what top-k left, keep. Ties with the last kept token are kept."""
    keys = ordered_bits(scaled)
    vocab = scaled.shape[-1]
    limited = (rows.top_k > 0) & (rows.top_k < vocab)
    counts = jnp.where(limited, rows.top_k, vocab).astype(jnp.float32)
    everything = jnp.ones_like(scaled, bool)

    def by_count(_: None) -> Array:
        return keys >= largest_threshold(keys, jnp.ones_like(scaled), counts)[:, None]

    kept = lax.cond(jnp.any(limited), by_count, lambda _: everything, None)

    def by_mass(kept: Array) -> Array:
        mass = jnp.where(kept, jax.nn.softmax(scaled, axis=-1), 0.0)
        threshold = largest_threshold(keys, mass, rows.top_p * jnp.sum(mass, axis=-1))
        # top_p = 1 keeps all, also what rounding of the mass would lose.
        return kept & ((keys >= threshold[:, None]) | (rows.top_p >= 1.0)[:, None])

    return lax.cond(jnp.any(rows.top_p < 1.0), by_mass, lambda kept: kept, kept)


def invert_cdf(mass: Float[Array, "S V"], uniform: Float[Array, "S"]) -> Int[Array, "S"]:
    """Per row the first token whose cumulative mass exceeds `uniform` × total; never one without mass."""
    vocab = mass.shape[-1]
    blocks = jnp.pad(mass, ((0, 0), (0, -vocab % BLOCK))).reshape(mass.shape[0], -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]

    def pick(ends: Array, mass: Array, target: Array) -> Array:
        # The last entry with mass bounds the pick from above: rounding may leave the target at the very end.
        last = mass.shape[-1] - 1 - jnp.argmax((mass > 0)[:, ::-1], axis=-1)
        return jnp.minimum(jnp.sum(ends <= target[:, None], axis=-1), last)

    block = pick(ends, sums, target)
    start = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    inside = pick(jnp.cumsum(chosen, axis=-1), chosen, target - start)
    return (block * BLOCK + inside).astype(jnp.int32)


def sample(logits: Float[Array, "S V"], rows: SamplingRows) -> Int[Array, "S"]:
    """The next token of each row. A batch of greedy rows only takes the argmax and nothing else."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_greedy = rows.temperature <= 0.0

    def draw(_: None) -> Array:
        temperature = jnp.where(is_greedy, 1.0, rows.temperature)
        scaled = logits.astype(jnp.float32) / temperature[:, None]
        scaled = scaled - jnp.max(scaled, axis=-1, keepdims=True)
        mass = jnp.where(kept_tokens(scaled, rows), jnp.exp(scaled), 0.0)
        return jnp.where(is_greedy, greedy, invert_cdf(mass, uniforms(rows)))

    return lax.cond(jnp.all(is_greedy), lambda _: greedy, draw, None)
