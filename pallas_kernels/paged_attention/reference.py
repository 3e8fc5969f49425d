"""The oracle of ragged paged attention, written to be obvious: one row at a time, over every key of its sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Case, why_not_xla
from pallas_kernels.paged_attention.options import AttentionOptions
from pallas_kernels.paged_attention.pages import (
    from_page_dtype,
    is_tpu_layout,
    pack_tokens,
    to_page_dtype,
    tpu_to_plain,
    why_not_any_layout,
)
from pallas_kernels.paged_attention.plan import AttentionPlan


def why_not(case: Case) -> str | None:
    """Refuses what XLA does: it runs everywhere else, but reads whole block tables, so it is for tests."""
    return why_not_any_layout(case) or why_not_xla(case)


def paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array]:
    """Attends without the work list, see `pallas_kernels.paged_attention.paged_attention`. Padding rows give 0."""
    layer, scale, window, softcap, sinks, k_scale, v_scale = options
    num_heads, (num_kv_heads, head_dim) = q.shape[1], k_new.shape[1:]
    num_sequences = plan.kv_len.shape[0]
    on_tpu = is_tpu_layout(pages.shape, num_kv_heads, head_dim, pages.dtype.itemsize)
    page_size = pages.shape[2 if on_tpu else 4]

    page, offset = plan.write_slot // page_size, plan.write_slot % page_size
    k_stored, v_stored = to_page_dtype(k_new, k_scale, pages.dtype), to_page_dtype(v_new, v_scale, pages.dtype)
    if on_tpu:
        pages = pages.at[layer, page, offset].set(pack_tokens(k_stored, v_stored))
    else:
        pages = pages.at[layer, page, 0, :, offset].set(k_stored)
        pages = pages.at[layer, page, 1, :, offset].set(v_stored)

    def one_row(row: jax.Array) -> jax.Array:
        is_token = row < plan.q_start[num_sequences]
        seq = jnp.minimum(jnp.searchsorted(plan.q_start, row, side="right") - 1, num_sequences - 1)
        position = plan.kv_len[seq] - plan.q_start[seq + 1] + row

        stored = pages[layer, plan.block_tables[seq]]
        if on_tpu:
            stored = tpu_to_plain(stored, num_kv_heads, head_dim)
        tokens = from_page_dtype(stored)  # [B, 2, Hkv, C, D]
        tokens = tokens.transpose(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
        key_position = jnp.arange(tokens.shape[2], dtype=jnp.int32)
        visible = key_position <= position
        if window is not None:
            visible &= key_position > position - window
        tokens = jnp.where(visible[None, None, :, None], tokens, 0.0)  # pages may hold NaN past the last token
        k = tokens[0] if k_scale is None else tokens[0] * jnp.asarray(k_scale, jnp.float32)
        v = tokens[1] if v_scale is None else tokens[1] * jnp.asarray(v_scale, jnp.float32)

        group = num_heads // num_kv_heads
        query = q[row].astype(jnp.float32).reshape(num_kv_heads, group, head_dim)
        scores = jnp.einsum("hgd,hkd->hgk", query, k, precision="highest") * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(visible[None, None, :], scores, -jnp.inf)
        if sinks is not None:  # one more key per head, with no value: it only takes probability away
            sink = sinks.astype(jnp.float32).reshape(num_kv_heads, group, 1)
            scores = jnp.concatenate([scores, sink], axis=-1)
        probabilities = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
        result = jnp.einsum("hgk,hkd->hgd", probabilities, v, precision="highest")
        return jnp.where(is_token, result.reshape(num_heads, head_dim), 0.0)

    out = lax.map(one_row, jnp.arange(q.shape[0], dtype=jnp.int32))
    return out.astype(q.dtype), pages
