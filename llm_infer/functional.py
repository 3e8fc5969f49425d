"""The engine's parts as functions of arrays, for notebooks: load, empty_cache, make_plan, forward, draw.

Axis letters: T tokens in the step, S sequences, B pages per block table, V tokens of the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Progress
from llm_infer.engine.platform import layer_loop, query_rows
from llm_infer.engine.step.paged import attention_over
from llm_infer.engine.step.state import PAGES, Cache
from llm_infer.loading import load as load_with_settings
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import Params, merge_model
from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights.default_model import DEFAULT_MODEL
from pallas_kernels.draw_tokens import Limits, draw_tokens
from pallas_kernels.paged_attention import (
    AttentionPlan,
    PlanShape,
    fill_plan,
    kv_pool_dtype,
    kv_pool_shape,
    plan_fields,
)

__all__ = ["AttentionPlan", "Cache", "LoadedModel", "draw", "empty_cache", "forward", "load", "make_plan"]

PAGE_SIZE = 16
"""Tokens in a page where nothing is said."""


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL.name,
    *,
    dtype: str = "auto",
    precision: str = "exact",
    load_format: str = "auto",
    fused_qkv: bool = True,
    progress: bool = True,
) -> tuple[Tokenizer, LoadedModel]:
    """Loads a model on one device.

    Args:
        model, dtype, precision, load_format, fused_qkv: as of `LLM`.
        progress: shows what is read on stderr.

    Returns:
        The tokenizer; and the model, whose `params` is a dictionary of about a dozen arrays, each stacked over the layers.

    Raises:
        UserError: the model cannot be found or loaded.
    """
    return load_with_settings(
        model,
        dtype=dtype,
        precision=precision,
        load_format=load_format,
        fused_qkv=fused_qkv,
        progress=Progress(enabled=progress),
    )


def empty_cache(model: LoadedModel, num_pages: int, *, page_size: int = PAGE_SIZE) -> Cache:
    """Makes the pages that hold keys and values of all layers; page 0 is the null page, which no sequence owns.

    Raises:
        UserError: fewer than two pages, or a page size below 1.
    """
    if num_pages < 2 or page_size < 1:
        raise UserError(f"num_pages={num_pages}, page_size={page_size}: expected at least 2 pages of at least 1 token")
    platform, config = _platform(), model.config
    shape = kv_pool_shape(
        platform,
        num_layers=config.num_layers,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
    )
    return {PAGES: jnp.zeros(shape, kv_pool_dtype(platform, model.dtype))}


def make_plan(
    model: LoadedModel,
    new_tokens: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    tables: Int[np.ndarray, "S B"],
    *,
    page_size: int = PAGE_SIZE,
) -> AttentionPlan:
    """Plans a step on the host: which pages each sequence reads and writes.

    Plans of steps with the same number of tokens and sequences have the same shapes, so they can be stacked for a
    `lax.scan`.

    Args:
        new_tokens: tokens of each sequence in this step; a step may mix prompts of any length with single tokens.
        lengths: tokens of each sequence after the step.
        tables: page ids of each sequence.
        page_size: as of `empty_cache`.

    Raises:
        ValueError: lengths, tables and pages do not go together; the message says how.
    """
    total = int(np.sum(new_tokens))
    rows = min(total, query_rows(_platform(), model.config.group_size))
    sizes = PlanShape(tokens=total, sequences=len(tables), pages_per_seq=np.shape(tables)[1], q_block=rows)
    arrays = {name: np.zeros(size, np.int32) for name, size in plan_fields(sizes).items()}
    fill_plan(sizes, arrays, new_tokens, lengths, tables, page_size)
    return AttentionPlan(**arrays)


def forward(
    model: LoadedModel,
    params: Params,
    cache: Cache,
    plan: AttentionPlan,
    token_ids: Int[Array, " T"],
    *,
    all_tokens: bool = False,
) -> tuple[Float[Array, "_ V"], Cache]:
    """Computes a step. To be called under jit with `cache` donated: the pages are updated in place.

    Args:
        model: its definition is used, not its parameters, which are `params` so that a jitted function may take them.
        cache: from `empty_cache` or the step before.
        plan: from `make_plan`, as arrays of NumPy or JAX.
        token_ids: the new tokens of all sequences, one sequence after the other.
        all_tokens: return the logits of every token, [T, V], not of each sequence's last, [S, V].

    Returns:
        Logits in float32, and the cache with the keys and values of the new tokens.
    """
    plan = AttentionPlan(*(jnp.asarray(array) for array in plan))
    decoder = merge_model(model.definition, params)
    token = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    owner = jnp.searchsorted(plan.q_start[1:], token, side="right")
    positions = (plan.kv_len - plan.q_start[1:])[owner] + token
    hidden, cache = decoder(token_ids, positions, cache, attention_over(plan), loop=layer_loop(_platform()))
    return decoder.logits(hidden if all_tokens else hidden[plan.q_start[1:] - 1]), cache


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
        logits: from `forward`.
        keys: [S] keys of `jax.random`; a row's token depends on its own key, logits and parameters alone.
        temperature, top_k, top_p, min_p, typical_p: as of `SamplingParams`; temperature 0 takes the most likely token.
    """
    rows = logits.shape[0]
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "typical_p": typical_p}
    types = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in given}
    limits = {name: jnp.broadcast_to(jnp.asarray(value, types[name]), (rows,)) for name, value in given.items()}
    return draw_tokens(logits, Limits(**limits), jax.vmap(jax.random.uniform)(keys))


def _platform() -> str:
    platform = jax.default_backend()
    return "gpu" if platform == "cuda" else platform
