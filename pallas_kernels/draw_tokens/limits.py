"""What each row of a draw is limited to."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

CANDIDATES = 64
"""Rows of which fewer tokens are kept than this draw among them in descending order, others in the order of the vocabulary."""


class Limits(NamedTuple):
    """Parameters of each row, all [S].

    `temperature` 0 is greedy; `top_k` ≤ 0 keeps all, as do `top_p` 1, `min_p` 0 and `typical_p` 1.
    """

    temperature: Float[Array, "S"]
    top_p: Float[Array, "S"]
    top_k: Int[Array, "S"]
    min_p: Float[Array, "S"]
    typical_p: Float[Array, "S"]
