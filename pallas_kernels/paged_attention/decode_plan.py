"""The plan of a decode step whose sequences go on from positions that only the device knows (several steps in one)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.plan import AttentionPlan


def decode_plan(plan: AttentionPlan, position: jax.Array, active: jax.Array, page_size: int) -> AttentionPlan:
    """Makes the plan that `fill_plan` would make for one token of each sequence, at other positions.

    Args:
        plan: a plan with as many tokens as sequences, one of each of the first n: their order and pages stay.
        position: Int32[Array, " S"], position of each sequence's token. Its pages are in the block table already.
        active: Bool[Array, " S"], false for sequences that have ended and for padding. The token of one that has ended is
            written to the null page and sees one key of its own, so that it costs nothing and its output is finite.
        page_size: C, tokens.
    """
    seqs = jnp.arange(position.shape[0], dtype=jnp.int32)
    used = seqs < plan.counts[1]
    position = jnp.where(active, position, 0)
    index = position // page_size
    page = jnp.take_along_axis(plan.block_tables, index[:, None], axis=1)[:, 0]
    items = jnp.stack((seqs, seqs, jnp.ones_like(seqs), jnp.zeros_like(seqs), index + 1), axis=1)
    return plan._replace(
        kv_len=jnp.where(used, position + 1, 0),
        write_slot=jnp.where(active, page * page_size + position % page_size, 0),
        items=plan.items.at[: len(seqs)].set(jnp.where(used[:, None], items, 0)),
    )
