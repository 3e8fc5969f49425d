"""Ragged paged attention: the contract that every implementation keeps, and the entry points that pick one.

Axis letters: T tokens in the step, S sequences, B pages per block table, P pages, C tokens per page, L layers, Hq and
Hkv heads (Hq a multiple of Hkv), D head size, N pairs of pages.
"""

from __future__ import annotations

import os
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of, expect, layer_index
from pallas_kernels.paged_attention.device_plan import device_plan
from pallas_kernels.paged_attention.options import AttentionOptions
from pallas_kernels.paged_attention.pages import (
    KV_HEADS_AXIS,
    POOL_DTYPES,
    is_tpu_layout,
    kv_pool_dtype,
    kv_pool_shape,
)
from pallas_kernels.paged_attention.plan import AttentionPlan, PlanShape, check_plan, fill_plan, plan_fields

__all__ = [
    "KV_HEADS_AXIS",
    "AttentionOptions",
    "AttentionPlan",
    "PlanShape",
    "copy_pages",
    "device_plan",
    "fill_plan",
    "kv_pool_dtype",
    "kv_pool_shape",
    "paged_attention",
    "plan_fields",
]

CHECKED_VARIABLE = "LLM_INFER_CHECKED"


def paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    *,
    layer: jax.Array | int,
    scale: float,
    window: jax.Array | int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes a step's K and V into the pages of one layer and attends, for a ragged batch of any mix of phases.

    Row t of sequence s at position p sees the keys at positions 0 … p of s (with `window`: p - window + 1 … p), those
    written by this call included. Scores and sums are float32 whatever the dtypes. Call it under jit with `pages`
    donated: they are updated in place.

    No sequence may read a slot that another writes in the same call: kernels write a sequence's new K and V while they
    read others', in any order. Two sequences may share pages (a common prefix) as long as neither writes to
    them. The caller guarantees this; nothing here checks it.

    Args:
        q: Float[Array, "T Hq D"]. Query head h reads KV head h // (Hq / Hkv). Rows past the last token may hold
            anything.
        k_new: Float[Array, "T Hkv D"], rotary embedding applied.
        v_new: Float[Array, "T Hkv D"].
        pages: the whole pool, all layers, of shape `kv_pool_shape(...)` and dtype `kv_pool_dtype(...)`. Page 0 is the
            null page: it, unused pages and slots past a sequence's last token may hold anything, NaN included.
        plan: the step's AttentionPlan, from `fill_plan`.
        layer: Int32 scalar, may be traced; selects the layer of the pool.
        scale: factor of the scores, usually D ** -0.5.
        window: tokens that a row sees, itself included; None for all. May be a traced int32 scalar (layers that differ
            under `lax.scan`), where a value of at least the context length means all.
        softcap: scores become softcap * tanh(scores / softcap) before the mask; None for no cap.
        sinks: Float[Array, " Hq"], one more score per head that takes part in the softmax but has no value (as in
            gpt-oss).
        k_scale: Float scalar; K is divided by it when stored and multiplied by it when read. None is 1. Pages of uint8 have
            scales of their own, and take none.
        v_scale: the same for V.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        out Float[Array, "T Hq D"] in q's dtype (padding rows finite but unspecified), and the updated pages.

    Raises:
        ValueError: at trace time, for shapes, dtypes or values that do not fit together (the message names the
            argument), or no implementation, or not the one asked for, can run the case.
        jax.errors.JaxRuntimeError: when the program runs, if LLM_INFER_CHECKED=1 was set when it was traced and the plan
            points outside the pool or contradicts itself (the message names the array of the plan, see `check_plan`).
    """
    options = AttentionOptions(layer, scale, window, softcap, sinks, k_scale, v_scale)
    _check(q, k_new, v_new, pages, plan, options)
    if os.environ.get(CHECKED_VARIABLE) == "1":
        on_tpu = is_tpu_layout(pages.shape, k_new.shape[1], k_new.shape[2], pages.dtype.itemsize)
        page_size = pages.shape[2 if on_tpu else 4]
        jax.debug.callback(partial(check_plan, num_pages=pages.shape[1], page_size=page_size), plan)
    case = case_of(
        {"q": q, "k_new": k_new, "v_new": v_new, "pages": pages, **plan._asdict()},
        q_block=plan.q_block,
        window="traced" if isinstance(window, jax.Array) else window,
        softcap=softcap,
        sinks=sinks is not None,
        kv_scales=k_scale is not None or v_scale is not None,
    )
    return dispatch.pick("paged_attention", case, implementation)(q, k_new, v_new, pages, plan, options)


def copy_pages(
    pages: jax.Array, src: jax.Array, dst: jax.Array, count: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Copies pages in all layers (copy-on-write), in place where the caller's jit donates the pool.

    Args:
        pages: the whole pool, of shape `kv_pool_shape(...)`.
        src: Int32[Array, " N"] page ids to copy from.
        dst: Int32[Array, " N"] page ids to copy to: all different, and none of them also a source.
        count: Int32 scalar, dynamic: the first `count` pairs are copied.
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        The updated pages.

    Raises:
        ValueError: at trace time, for ranks, shapes or dtypes other than these.
    """
    for name, array, rank in (("src", src, 1), ("dst", dst, 1), ("count", count, 0)):
        expect(array.ndim == rank and array.dtype == jnp.int32, name, f"int32 of rank {rank}", array)
    expect(src.shape == dst.shape, "dst", f"the shape of src, {list(src.shape)}", dst)
    case = case_of({"pages": pages, "src": src, "dst": dst})
    return dispatch.pick("copy_pages", case, implementation)(pages, src, dst, count)


def _check(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> None:
    """Raises ValueError for the first argument that does not fit the others."""
    for name, array in (("q", q), ("k_new", k_new), ("v_new", v_new)):
        expect(array.ndim == 3, name, "rank 3 [T, heads, D]", array)
        expect(jnp.issubdtype(array.dtype, jnp.floating), name, "a floating dtype", array)
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_new.shape[1]
    expect(k_new.shape == (tokens, num_kv_heads, head_dim), "k_new", f"[T={tokens}, Hkv, D={head_dim}] as in q", k_new)
    expect(v_new.shape == k_new.shape, "v_new", f"the shape of k_new, {list(k_new.shape)}", v_new)
    expect(num_heads % num_kv_heads == 0, "q", f"a number of heads that is a multiple of Hkv={num_kv_heads}", q)
    expect(pages.ndim == 6, "pages", "rank 6, see kv_pool_shape", pages)
    expect(pages.dtype.name in POOL_DTYPES, "pages", f"a dtype of {', '.join(POOL_DTYPES)}", pages)
    for name, array in plan._asdict().items():
        expect(array.dtype == jnp.int32, f"plan.{name}", "int32", array)
    expect(plan.block_tables.ndim == 2, "plan.block_tables", "rank 2 [S, B]", plan.block_tables)
    sequences = plan.block_tables.shape[0]
    expect(plan.q_start.shape == (sequences + 1,), "plan.q_start", f"[S+1={sequences + 1}]", plan.q_start)
    expect(plan.kv_len.shape == (sequences,), "plan.kv_len", f"[S={sequences}]", plan.kv_len)
    expect(plan.write_slot.shape == (tokens,), "plan.write_slot", f"[T={tokens}] as in q", plan.write_slot)
    fits = plan.items.ndim == 2 and plan.items.shape[0] > sequences and plan.items.shape[1] == 5
    expect(fits, "plan.items", f"[N, 5] with N > S={sequences}", plan.items)
    expect(plan.counts.shape == (2,), "plan.counts", "[2]", plan.counts)
    layer, _, window, softcap, sinks, k_scale, v_scale = options
    layer_index(layer, pages.shape[0])
    if sinks is not None:
        floats = jnp.issubdtype(sinks.dtype, jnp.floating)
        expect(sinks.shape == (num_heads,) and floats, "sinks", f"floats of shape [Hq={num_heads}]", sinks)
    for name, scalar in (("window", window), ("k_scale", k_scale), ("v_scale", v_scale)):
        if isinstance(scalar, jax.Array):
            kind = jnp.floating if name.endswith("scale") else jnp.integer
            expect(scalar.ndim == 0 and jnp.issubdtype(scalar.dtype, kind), name, f"a scalar {kind.__name__}", scalar)
        if name != "window" and scalar is not None and pages.dtype == jnp.uint8:
            raise ValueError(f"{name} is {scalar}, expected None: these pages have a scale for each token and head")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window is {window}, expected at least 1 (the row itself) or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}, expected a positive number or None")
