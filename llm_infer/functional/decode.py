"""Decoding as a function: a cache of pages, and steps whose plan is made on the device, so that loops may be jitted whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llm_infer.base.errors import UserError
from llm_infer.engine.platform import layer_loop, query_rows
from llm_infer.engine.step.paged import PagedAttention
from llm_infer.engine.step.sharding import StepSharding
from llm_infer.engine.step.state import PAGES
from llm_infer.functional.over_mesh import over_mesh
from llm_infer.models.load import LoadedModel, kernel_params
from llm_infer.models.params import Params, merge_model
from pallas_kernels.causal_conv import StateRows
from pallas_kernels.paged_attention import device_plan

PAGE_SIZE = 16
"""Tokens in a page where nothing is said."""


@partial(
    jax.tree_util.register_dataclass, data_fields=["pages", "tables", "lengths", "states"], meta_fields=["page_size"]
)
@dataclass(frozen=True)
class Cache:
    """What sequences remember: keys and values in pages, and where they are. A pytree, to be donated.

    Attributes:
        pages: the pool of all layers, in the layout of the backend.
        tables: [S, B] pages of each sequence.
        lengths: [S] tokens of each sequence.
        page_size: tokens in a page.
        states: of layers that do not attend, a pool for each kind of state; the sequence in row i has page i + 1.
    """

    pages: Any
    tables: Any
    lengths: Any
    page_size: int
    states: Any = None


def make_cache(model: LoadedModel, sequences: int, max_len: int, *, page_size: int = PAGE_SIZE) -> Cache:
    """Makes an empty cache for so many sequences of up to `max_len` tokens, on the model's devices.

    Raises:
        UserError: sizes below 1, or a number of sequences that the shards of the batch do not divide.
    """
    if min(sequences, max_len, page_size) < 1:
        raise UserError(f"sequences={sequences}, max_len={max_len}, page_size={page_size}: expected at least 1 of each")
    shards, sharding = model.num_shards, StepSharding.of(model.config, model.mesh)
    if sequences % shards:
        raise UserError(f"sequences={sequences}: expected a multiple of the {shards} shards of the batch")
    pages_each, rows = -(-max_len // page_size), sequences // shards
    pool = sharding.pool(1 + rows * pages_each, page_size, model.config.num_attending, model.dtype)
    tables = 1 + jnp.arange(rows * pages_each, dtype=jnp.int32).reshape(rows, pages_each)
    tables, lengths = jnp.tile(tables, (shards, 1)), jnp.zeros(sequences, jnp.int32)
    if model.mesh is not None:
        batch = NamedSharding(model.mesh, sharding.batch)
        tables, lengths = jax.device_put((tables, lengths), batch)
    states = {name: sharding.zeros(each) for name, each in sharding.states(1 + rows, model.dtype).items()}
    return Cache(sharding.zeros(pool), tables, lengths, page_size, states)


def decode_step(
    model: LoadedModel,
    params: Params,
    cache: Cache,
    token_ids: Array | np.ndarray,
    counts: Array | np.ndarray | None = None,
    *,
    all_tokens: bool = False,
) -> tuple[Float[Array, "S V"] | Float[Array, "S K V"], Cache]:
    """Appends tokens to each sequence and computes the logits of the next; prompts go in as many tokens at once.

    To be called under jit with `cache` donated; it may be the body of a `scan` or `while_loop`.

    Args:
        model: says what is computed; its own parameters are not used.
        params: `model.params`, or others of the same names and shapes.
        cache: from `make_cache` or the step before.
        token_ids: [S], a token of each sequence, or [S, K], up to K of each.
        counts: [S], how many of a row's K tokens are real, the first ones; all where nothing is said. A sequence with 0 stays as
            it is, and its logits mean nothing.
        all_tokens: return logits of all K tokens, not of the last real one.

    Returns:
        Logits in float32, and the cache. A sequence that grows past the cache's `max_len` loses what is past it.
    """
    if token_ids.ndim not in (1, 2) or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(f"token_ids is {token_ids.dtype}{list(token_ids.shape)}, expected whole numbers [S] or [S, K]")
    if len(token_ids) != len(cache.lengths):
        raise ValueError(f"token_ids has {len(token_ids)} rows, the cache has {len(cache.lengths)} sequences")
    rows = jnp.asarray(token_ids, jnp.int32).reshape(len(token_ids), -1)
    counts = jnp.asarray(rows.shape[1] if counts is None else counts, jnp.int32)
    counts = jnp.clip(jnp.broadcast_to(counts, len(rows)), 0, rows.shape[1])
    sharding = StepSharding.of(model.config, model.mesh)

    def run(params: Params, arrays: tuple[Cache, Array, Array]) -> tuple[Array, Cache]:
        return _step(model, sharding.platform, params, *arrays, all_tokens)

    batch = PartitionSpec() if model.mesh is None else sharding.batch

    def cut(pool: jax.ShapeDtypeStruct) -> PartitionSpec:
        return PartitionSpec() if pool.sharding is None else pool.sharding.spec

    pool = sharding.pool(2, cache.page_size, model.config.num_attending, model.dtype)
    states = {name: cut(each) for name, each in sharding.states(2, model.dtype).items()}
    cuts = replace(cache, pages=cut(pool), tables=batch, lengths=batch, states=states)
    logits, cache = over_mesh(model, run, params, (cache, rows, counts), (cuts, batch, batch), (batch, cuts))
    return (logits if all_tokens and token_ids.ndim == 2 else logits.reshape(len(rows), -1)), cache


def _step(
    model: LoadedModel,
    platform: str,
    params: Params,
    cache: Cache,
    rows: Int[Array, "S K"],
    counts: Int[Array, " S"],
    all_tokens: bool,
) -> tuple[Array, Cache]:
    """Computes one device's part of a step."""
    sequences, most = rows.shape
    lengths = cache.lengths + counts
    q_block = min(query_rows(platform, model.config.group_size), sequences * most)
    plan = device_plan(counts, lengths, cache.tables, tokens_per_seq=most, page_size=cache.page_size, q_block=q_block)
    # Rows of the step are those of the sequences, one behind the other; padding is behind them all.
    row = jnp.arange(sequences * most, dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(row[:, None] >= plan.q_start[None, 1:], axis=1, dtype=jnp.int32), sequences - 1)
    offset = jnp.clip(row - plan.q_start[owner], 0, most - 1)
    decoder = merge_model(model.definition, kernel_params(model, params))
    own = 1 + jnp.arange(sequences, dtype=jnp.int32)
    before, behind = jnp.where(cache.lengths > 0, own, 0), jnp.where(counts > 0, own, 0)
    states = StateRows(plan.q_start, before, behind, counts) if model.config.recurrent else None
    hidden, pools = decoder(
        rows[owner, offset],
        cache.lengths[owner] + offset,
        {PAGES: cache.pages, **(cache.states or {})},
        PagedAttention(plan, states),
        loop=layer_loop(platform),
    )
    if all_tokens:
        each = plan.q_start[:-1, None] + jnp.arange(most, dtype=jnp.int32)[None]
        picked = jnp.minimum(each, jnp.maximum(plan.q_start[1:] - 1, 0)[:, None]).reshape(-1)
    else:
        picked = jnp.maximum(plan.q_start[1:] - 1, 0)
    logits = decoder.logits(hidden[picked])
    if all_tokens:
        logits = logits.reshape(sequences, most, -1)
    states = {name: pool for name, pool in pools.items() if name != PAGES}
    return logits, replace(cache, pages=pools[PAGES], lengths=lengths, states=states)
