"""Limits of each row of a draw."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CANDIDATES = 64
"""Rows that keep fewer tokens than this draw among them in descending order, others in the order of the vocabulary."""

# For kernels that search by cost: how far a logit, divided by the temperature, lies below the largest. Bits are int32.
SMALLEST = 2.0**-126
"""Lowest temperature that does not count as 0: the smallest normal float. XLA takes smaller ones as 0."""
FINITE = 0x7F7FFFFF
"""Bits of the largest float, which bounds all costs but that of a token with logit -inf."""
WEIGHTLESS = 0x42B00000
"""Bits of 88: exp(-88) is taken as 0."""
ALL_BITS = 0x7FFFFFFF


class Limits(NamedTuple):
    """Parameters of each row, all [S].

    `temperature` 0 is greedy; `top_k` ≤ 0 keeps all, as do `top_p` 1, `min_p` 0 and `typical_p` 1.
    """

    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    top_k: Int[Array, " S"]
    min_p: Float[Array, " S"]
    typical_p: Float[Array, " S"]

    def highest_cost(self) -> Float[Array, " S"]:
        """Returns the highest cost of a token that min-p keeps: -log(min_p), without the sign that -0 would have."""
        return jnp.abs(jnp.log(self.min_p))
