"""Paged attention on TPU (Pallas): what the kernel can run, and its arguments in the form that it needs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Case, target
from pallas_kernels.paged_attention import tpu_kernel
from pallas_kernels.paged_attention.options import AttentionOptions
from pallas_kernels.paged_attention.pages import (
    LANES,
    is_tpu_layout,
    itemsize_of,
    pack_tokens,
    to_page_dtype,
    token_shape,
)
from pallas_kernels.paged_attention.plan import AttentionPlan
from pallas_kernels.paged_attention.tpu_blocks import Blocks, check_blocks, choose_blocks
from pallas_kernels.paged_attention.tpu_softmax import LOG2E, ROWS, score_factor
from pallas_kernels.paged_attention.tpu_words import pack_words

PAGE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
CORES = {"TPU v4": 2, "TPU v5": 2, "TPU v5p": 2}
"""TensorCores of a JAX device by its kind, where it has several: one program runs on all of them."""
VMEM_MARGIN = 8 << 20  # for the compiler's additions to the scratch memory
PAGE_SIZES = (8, 512)


def why_not(case: Case) -> str | None:
    """Refuses other layouts than the TPU's, and dtypes with which a TPU does not compute."""
    num_kv_heads, head_dim = case.shapes["k_new"][1:]
    shape, dtype = case.shapes["pages"], case.dtypes["pages"]
    if dtype not in PAGE_DTYPES:
        return f"needs pages of {', '.join(PAGE_DTYPES)}, found {dtype}"
    if case.dtypes["q"] not in ("float32", "bfloat16"):
        return f"needs q of float32 or bfloat16, found {case.dtypes['q']}"
    if head_dim > 2 * LANES:
        return f"needs a head size of at most {2 * LANES}, found {head_dim}"
    if not is_tpu_layout(shape, num_kv_heads, head_dim, itemsize_of(dtype)):
        words, packing, lanes = token_shape(num_kv_heads, head_dim, itemsize_of(dtype))
        return f"needs pages of shape [L, P, C, {words}, {packing}, {lanes}], found {list(shape)}"
    if not PAGE_SIZES[0] <= shape[2] <= PAGE_SIZES[1] or shape[2] & (shape[2] - 1):
        return f"needs a page size that is a power of two from {PAGE_SIZES[0]} to {PAGE_SIZES[1]}, found {shape[2]}"
    return None


def paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    options: AttentionOptions,
    *,
    blocks: Blocks | None = None,
    cores: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends on a TPU, see `pallas_kernels.paged_attention.paged_attention`. Padding rows give 0.

    Args:
        blocks: block sizes; None takes tuned ones, else estimated ones (`tpu_blocks`).
        cores: cores that share the work; None takes those of the device.
        interpret: that of `pallas_call`, for tests without a TPU.
    """
    layer, scale, window, softcap, sinks, k_scale, v_scale = options
    (tokens, num_heads, head_dim), num_kv_heads = q.shape, k_new.shape[1]
    dtype = q.dtype
    packing, lanes = pages.shape[4:]
    group = group_rows(num_heads // num_kv_heads, dtype.itemsize)
    multiple = max(ROWS // group, packing)  # heads of a bundle of rows, heads that share a word
    heads = -(-num_kv_heads // multiple) * multiple
    if blocks is None:
        blocks = choose_blocks(target()[1], pages, head_dim, group, plan.q_block)
    check_blocks(blocks, pages.shape[2], group)
    tile_rows = blocks.tile_rows
    rows = -(-plan.q_block // tile_rows) * tile_rows if plan.q_block > 1 else 1
    static = tpu_kernel.Static(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=pages.shape[2],
        rows=rows,
        tile_rows=tile_rows,
        decode_pages=blocks.decode_pages,
        mixed_pages=blocks.mixed_pages,
        softcap=softcap,
        sinks=sinks is not None,
        window=window is not None,
        dtype=dtype,
        page_dtype=pages.dtype,
        cores=CORES.get(target()[1], 1) if cores is None else cores,
        interpret=bool(interpret),
    )
    block = max(blocks.decode_pages, blocks.mixed_pages if rows > 1 else 0) * pages.shape[2]

    def grouped(x: jax.Array) -> jax.Array:
        """Turns [T, Hq, D] into [T, heads, group, D], padded with 0."""
        x = x.reshape(x.shape[0], num_kv_heads, -1, x.shape[2])
        return jnp.pad(x, ((0, 0), (0, heads - num_kv_heads), (0, group - x.shape[2]), (0, 0)))

    kv_new = (pack_tokens if interpret else pack_words)(
        to_page_dtype(k_new, k_scale, pages.dtype), to_page_dtype(v_new, v_scale, pages.dtype)
    )
    sink_rows = jnp.zeros((ROWS, LANES), jnp.float32)
    if sinks is not None:
        padded = jnp.pad(sinks.astype(jnp.float32).reshape(num_kv_heads, -1), ((0, heads - num_kv_heads), (0, 0)))
        padded = jnp.pad(padded, ((0, 0), (0, group - padded.shape[1]))).reshape(-1, 1) * LOG2E
        sink_rows = jnp.broadcast_to(padded, (heads * group, LANES))
    tables = jnp.pad(plan.block_tables, ((0, 0), (0, -plan.block_tables.shape[1] % LANES)))[:, None, :]
    scalars = (
        plan.items.reshape(-1),
        plan.q_start,
        plan.kv_len,
        plan.counts,
        jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, 0 if window is None else window)]),
        jnp.stack(
            [score_factor(scale, softcap, k_scale), jnp.asarray(1.0 if v_scale is None else v_scale, jnp.float32)]
        ),
    )
    queries = grouped(q)

    def in_hbm(x: jax.Array) -> jax.Array:
        """Keeps an array out of VMEM, where XLA would put small ones and copies of a dynamic size are loops of loads and
        stores."""
        return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)

    array = jax.ShapeDtypeStruct if interpret else pltpu.HBM
    hbm, smem = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.SMEM)
    state, f32 = heads * group, jnp.float32
    many = (heads, rows * group)
    scratch = {
        "table": pltpu.SMEM((tpu_kernel.TABLES, 1, tables.shape[2]), jnp.int32),
        "kv": pltpu.VMEM((2, block, *kv_new.shape[1:]), kv_new.dtype),
        "zeros": pltpu.VMEM((ROWS, heads, group, head_dim), dtype),
        "q_one": pltpu.VMEM((2, heads, group, head_dim), dtype),
        "q_many": pltpu.VMEM((2, heads, rows, group, head_dim), dtype),
        "out_one": pltpu.VMEM((2, heads, group, head_dim), dtype),
        "out_many": pltpu.VMEM((2, heads, rows, group, head_dim), dtype),
        "one_q": pltpu.VMEM((heads, max(ROWS, group), lanes), dtype),
        "one_max": pltpu.VMEM((state, LANES), f32),
        "one_sum": pltpu.VMEM((state, LANES), f32),
        "one_acc": pltpu.VMEM((state, lanes), f32),
        "many_max": pltpu.VMEM((*many, LANES), f32),
        "many_sum": pltpu.VMEM((*many, LANES), f32),
        "many_acc": pltpu.VMEM((*many, lanes), f32),
        "k_block": pltpu.VMEM((block, lanes), dtype),
        "v_block": pltpu.VMEM((block, lanes), dtype),
        "table_sem": pltpu.SemaphoreType.DMA((tpu_kernel.TABLES,)),
        "kv_sem": pltpu.SemaphoreType.DMA((2,)),
        "q_sem": pltpu.SemaphoreType.DMA((2,)),
        "out_sem": pltpu.SemaphoreType.DMA((2,)),
        "write_sem": pltpu.SemaphoreType.DMA,
    }
    operands = (*scalars, in_hbm(tables), in_hbm(queries), in_hbm(kv_new), sink_rows, in_hbm(pages))
    out, pages = pl.pallas_call(
        partial(tpu_kernel.kernel, static=static),
        grid=(static.cores,),
        out_shape=(array(queries.shape, dtype), array(pages.shape, pages.dtype)),
        in_specs=[*(smem for _ in scalars), hbm, hbm, hbm, pl.BlockSpec(memory_space=pltpu.VMEM), hbm],
        out_specs=(hbm, hbm),
        scratch_shapes=list(scratch.values()),
        input_output_aliases={len(operands) - 1: 1},
        interpret=interpret,
        name=f"paged_attention_{static.page_size}x{blocks.decode_pages}_{rows}",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=vmem_bytes(scratch) + VMEM_MARGIN,
            disable_bounds_checks=True,
        ),
    )(*operands)
    out = out[:, :num_kv_heads, : num_heads // num_kv_heads].reshape(tokens, num_heads, head_dim)
    return out, pages


def group_rows(group: int, itemsize: int) -> int:
    """Returns the query heads per KV head, rounded up to a power of two and to whole words."""
    return max(4 // itemsize, 1 << (group - 1).bit_length())


def vmem_bytes(scratch: dict[str, Any]) -> int:
    """Returns the bytes of VMEM that scratch arrays take; the last axis takes whole registers of 128 lanes."""
    total = 0
    for ref in scratch.values():
        if getattr(ref, "memory_space", None) == pltpu.VMEM:
            *lead, last = ref.shape
            total += math.prod(lead) * -(-last // LANES) * LANES * jnp.dtype(ref.dtype).itemsize
    return total
