"""Changes logits before the draw: penalties and biases from per-slot state on the device, and masks of allowed tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class PenaltyState(NamedTuple):
    """State that sequences bring to every draw, by slot; one slot beyond those of the sequences takes what nobody reads.

    `seen` is twice the number of times that a token was drawn, plus one if it is in the prompt.
    """

    seen: Int[Array, "slots V"]
    bias: Float[Array, "slots V"]


class PenaltyRows(NamedTuple):
    """Penalties of each row, all [S]; `has_bias` is 1 where the slot's row of biases counts."""

    repetition_penalty: Float[Array, " S"]
    presence_penalty: Float[Array, " S"]
    frequency_penalty: Float[Array, " S"]
    has_bias: Int[Array, " S"]


def empty_penalties(slots: int, vocab: int) -> PenaltyState:
    """Returns the state of `slots` sequences that have seen nothing."""
    return PenaltyState(jnp.zeros((slots, vocab), jnp.int32), jnp.zeros((slots, vocab), jnp.float32))


def set_slot(
    state: PenaltyState, slot: Int[Array, ""], seen: Int[Array, " V"], bias: Float[Array, " V"]
) -> PenaltyState:
    """Returns the state with one slot's rows replaced; to be jitted with the state donated."""
    rows = zip(state, (seen, bias), strict=True)
    return PenaltyState(*(lax.dynamic_update_index_in_dim(array, row, slot, 0) for array, row in rows))


def seen_counts(prompt: list[int], output: list[int], vocab: int) -> np.ndarray:
    """Returns a row of `PenaltyState.seen` [V] for a sequence with these tokens."""
    seen = 2 * np.bincount(output, minlength=vocab) if output else np.zeros(vocab, np.int64)
    seen[prompt] |= 1
    return seen.astype(np.int32)


def count_drawn(state: PenaltyState, slot: Int[Array, " S"], ids: Int[Array, " S"]) -> PenaltyState:
    """Returns the state after each row has drawn its id."""
    return state._replace(seen=state.seen.at[slot, ids].add(2))


def penalised(
    logits: Float[Array, "S V"], state: PenaltyState, slot: Int[Array, " S"], rows: PenaltyRows
) -> Float[Array, "S V"]:
    """Returns logits with penalties and biases.

    Repetition (Keskar et al., 2019) divides positive and multiplies negative logits of tokens that are in the prompt or the
    output; frequency × count and presence are subtracted from those of tokens in the output (OpenAI API); biases are added.
    """
    seen, bias = state.seen[slot], state.bias[slot]
    repetition, presence, frequency, has_bias = (value[:, None] for value in rows)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen > 0, repeated, logits)
    logits = logits - frequency * (seen >> 1).astype(jnp.float32)
    logits = logits - jnp.where(seen > 1, presence, 0.0)
    return logits + jnp.where(has_bias == 1, bias, 0.0)


def mask_logits(logits: Float[Array, "S V"], allowed: Int[Array, "S W"]) -> Float[Array, "S V"]:
    """Returns the logits, −∞ where bit `token % 32` of word `token // 32` of the row's mask is 0."""
    return jnp.where(unpacked_mask(allowed, logits.shape[1]), logits, -jnp.inf)


def unpacked_mask(mask: Int[Array, "*S W"], vocab: int) -> Bool[Array, "*S {vocab}"]:
    """Returns a bit for each token of the vocabulary: bit `token % 32` of word `token // 32`."""
    bits = (mask[..., None] >> lax.broadcasted_iota(jnp.int32, (*(1,) * mask.ndim, 32), mask.ndim)) & 1
    return bits.reshape(*mask.shape[:-1], -1)[..., :vocab] == 1


def packed_mask(allowed: Bool[Array, "S V"]) -> Int[Array, "S W"]:
    """Packs what `unpacked_mask` unpacks."""
    rows, vocab = allowed.shape
    bits = jnp.pad(allowed, ((0, 0), (0, -vocab % 32))).reshape(rows, -1, 32).astype(jnp.uint32)
    words = jnp.sum(bits << lax.broadcasted_iota(jnp.uint32, (1, 1, 32), 2), axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)
