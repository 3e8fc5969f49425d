"""Causal attention over whole rows by the kernel that decoding uses, so that scoring a text gives the bits of writing it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llm_infer.functional.attention import causal_attention
from llm_infer.models.decoder import Attend
from pallas_kernels.paged_attention import (
    AttentionPlan,
    PlanShape,
    fill_plan,
    kv_pool_dtype,
    kv_pool_shape,
    paged_attention,
    plan_fields,
)


def attend_by_pages(batch: int, length: int, page_size: int, platform: str, query_rows: int) -> Attend:
    """Makes what a model attends with: rows of tokens go through pages that live as long as a layer.

    The gradient is that of `causal_attention`.
    """
    pages_each = -(-length // page_size)
    tables = 1 + np.arange(batch * pages_each, dtype=np.int32).reshape(batch, pages_each)
    shape = PlanShape(batch * length, batch, pages_each, min(query_rows, batch * length))
    arrays = {name: np.zeros(size, np.int32) for name, size in plan_fields(shape).items()}
    fill_plan(shape, arrays, [length] * batch, [length] * batch, tables, page_size)

    def attend(
        query: Array,
        key: Array,
        value: Array,
        cache: Any,
        layer: Array,
        *,
        scale: float,
        window: Array | int | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> tuple[Array, Any]:
        fixed = None if isinstance(window, Array) else window

        def options(sinks: Array | None, window: Array | None) -> dict[str, Any]:
            seen = fixed if window is None else window
            return {"scale": scale, "softcap": softcap, "sinks": sinks, "window": seen}

        @jax.custom_vjp
        def by_pages(query: Array, key: Array, value: Array, sinks: Array | None, window: Array | None) -> Array:
            sizes = dict(num_layers=1, num_pages=1 + tables.size, page_size=page_size)
            heads = dict(num_kv_heads=key.shape[1], head_dim=key.shape[2])
            pool = kv_pool_shape(platform, **sizes, **heads, dtype=key.dtype)
            pages = jnp.zeros(pool, kv_pool_dtype(platform, key.dtype))
            plan = AttentionPlan(**{name: jnp.asarray(array) for name, array in arrays.items()})
            out, _ = paged_attention(query, key, value, pages, plan, layer=0, **options(sinks, window))
            return out

        def forwards(*given: Any) -> tuple[Array, Any]:
            return by_pages(*given), given

        def backwards(given: Any, change: Array) -> Any:
            *floats, window = given

            def dense(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
                q, k, v = (each.reshape(batch, length, *each.shape[1:]) for each in (query, key, value))
                one = jnp.zeros((batch, length), jnp.int32)
                return causal_attention(q, k, v, one, **options(sinks, window)).reshape(query.shape)

            _, pull = jax.vjp(dense, *floats)
            return (*pull(change), None if window is None else np.zeros(window.shape, jax.dtypes.float0))

        by_pages.defvjp(forwards, backwards)
        return by_pages(query, key, value, sinks, window if isinstance(window, Array) else None), cache

    return attend
