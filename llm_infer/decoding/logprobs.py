"""Log-probabilities of drawn and of most likely tokens, under the model's own distribution (before any sampling rule)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.draw_tokens.top_tokens import top_tokens
from pallas_kernels.row_sums import logsumexp, row_sums


class Logprobs(NamedTuple):
    """For each row, the log-probability and rank (1 = most likely) of its token, and the N most likely tokens."""

    logprobs: Float[Array, " S"]
    ranks: Int[Array, " S"]
    top_ids: Int[Array, "S N"]
    top_logprobs: Float[Array, "S N"]


def logprobs_of(logits: Float[Array, "S V"], ids: Int[Array, " S"], count: int) -> Logprobs:
    """Returns the log-probabilities of `ids` and of the `count` most likely tokens of each row."""
    logits = logits.astype(jnp.float32)
    total = logsumexp(logits)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)
    values, top_ids = top_tokens(logits, count)
    ranks = 1 + row_sums(logits, chosen[:, 0], kind="above").astype(jnp.int32)
    return Logprobs(chosen[:, 0] - total, ranks, top_ids, values - lax.expand_dims(total, (1,)))
