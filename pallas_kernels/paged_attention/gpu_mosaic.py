"""Ragged paged attention on Hopper: Mosaic GPU for rows of their own (decode), Triton for items of several rows.

It needs jax 0.11 or newer. A layer takes four launches: K and V into the pages, items of several rows (none while only decoding),
rows of their own, and the merge of their partial results.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Case, target
from pallas_kernels.gpu_devices import STREAMING_MULTIPROCESSORS, compute_capability
from pallas_kernels.paged_attention.gpu_blocks import (
    DECODING_TOKENS,
    EVERYTHING,
    choose_blocks,
    power_of_two,
)
from pallas_kernels.paged_attention.gpu_merge import merge_splits
from pallas_kernels.paged_attention.gpu_triton import attend
from pallas_kernels.paged_attention.gpu_units import make_units
from pallas_kernels.paged_attention.gpu_write import write_rows
from pallas_kernels.paged_attention.options import AttentionOptions
from pallas_kernels.paged_attention.pages import why_not_plain
from pallas_kernels.paged_attention.plan import AttentionPlan

OLDEST_JAX = (0, 11)
SPLIT_KEYS = 512


def why_not(case: Case) -> str | None:
    """Refuses all but compute capability 9.0 with bfloat16 or float16 pages of 64 or 128 tokens, in steps that mostly decode."""
    pages, dtype = case.shapes["pages"], case.dtypes["pages"]
    num_kv_heads, head_dim = case.shapes["k_new"][1:]
    group, page_size = case.shapes["q"][1] // num_kv_heads, pages[4] if len(pages) == 6 else 0
    tokens = case.shapes["q"][0]
    if case.options.get("invariant"):
        return "adds up a row's keys in other parts than a prefill does"
    if jax.__version_info__ < OLDEST_JAX:
        return f"needs jax 0.11 or newer, this is {jax.__version__}"
    if compute_capability(case.device_kind) != (9, 0):
        return f"is written for compute capability 9.0, not for {case.device_kind}"
    if reason := why_not_plain(pages, num_kv_heads, head_dim, case.dtypes["pages"]):
        return reason
    if dtype not in ("bfloat16", "float16") or case.dtypes["q"] != dtype:
        return f"multiplies bfloat16 or float16 pages with queries of their type, found {case.dtypes['q']} and {dtype}"
    if case.options["kv_scales"]:
        return "has no scales of K and V"
    if page_size not in (64, 128):
        return f"copies blocks of 64 tokens: takes page sizes 64 and 128, found {page_size}"
    if head_dim not in (64, 128):
        return f"has buffers for head sizes 64 and 128, found {head_dim}"
    if group > 64:
        return f"has 64 rows for the query heads of a group, found {group}"
    if tokens > DECODING_TOKENS:
        return f"is the decode kernel: takes steps of up to {DECODING_TOKENS} tokens, found {tokens}"
    return None


def paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    options: AttentionOptions,
    *,
    split_keys: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends on Hopper, see `pallas_kernels.paged_attention.paged_attention`. Padding rows give 0.

    `split_keys` is the least number of keys per unit. `interpret` runs the kernels in interpreters, with the twins that
    `gpu_mosaic_kernel` lists. Scales of K and V are not taken (`why_not`).
    """
    layer, scale, window, softcap, sinks, k_scale, v_scale = options
    assert k_scale is None and v_scale is None
    static = dict(scale=scale, softcap=softcap, split_keys=split_keys or SPLIT_KEYS, interpret=interpret)
    return _paged_attention(q, k_new, v_new, pages, plan, jnp.asarray(layer, jnp.int32), window, sinks, **static)


# This is jitted so that the layers of an unrolled loop share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "split_keys", "interpret"))
def _paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    layer: jax.Array,
    window: jax.Array | int | None,
    sinks: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    split_keys: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.paged_attention.gpu_mosaic_kernel import TILE, Static, attend_one_row

    tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.shape[3], pages.shape[4]
    group = num_heads // num_kv_heads
    pages, out = write_rows(q, k_new, v_new, pages, plan, layer, None, None, interpret)

    sizes = dict(num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, page_size=page_size, item_bytes=2)
    blocks = choose_blocks(plan, target()[1], pages.dtype.name, max_splits=1, **sizes)
    options: dict[str, Any] = dict(window=window, sinks=sinks, k_scale=None, v_scale=None)
    out = attend(q, pages, out, plan, layer, options, blocks, scale, softcap, interpret, part="many")

    table_keys = plan.block_tables.shape[1] * page_size
    max_splits = max(1, min(power_of_two(-(-128 // num_kv_heads)), 64, -(-table_keys // split_keys)))
    units = make_units(
        plan,
        page_size=page_size,
        group=group,
        tile=TILE,
        split_keys=split_keys,
        max_splits=max_splits,
        window=window,
        part="one",
    )
    padded = -(-group // 8) * 8
    # XLA would hand over a slice of the step's one buffer as it lies, and the kernel takes only what starts at a multiple of 256
    # bytes. As the result of an operation, which all layers share, the tables have a buffer of their own.
    tables = jnp.maximum(plan.block_tables, 0)
    rows = jnp.pad(q.reshape(tokens, num_kv_heads, group, head_dim), ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    # A thread block more than fit at a time would wait for another's whole walk. Shared memory holds one or two.
    resident = STREAMING_MULTIPROCESSORS * (1 if head_dim == 128 else 2)
    programs = max(1, min(units.units.shape[0], resident // num_kv_heads))
    partial, lse = attend_one_row(
        units.units,
        units.num_units,
        tables,
        layer.reshape(1),
        jnp.asarray(EVERYTHING if window is None else window, jnp.int32).reshape(1),
        rows,
        pages,
        slots=tokens * max_splits,
        static=Static(stages=4, programs=programs, scale=scale, softcap=softcap, twins=interpret),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,  # pyright: ignore (jax >= 0.11)
    )
    return merge_splits(out, partial, lse, units.merge, max_splits, sinks, interpret), pages
