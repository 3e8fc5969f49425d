"""Ragged paged attention on a GPU through Pallas' Triton lowering: prefill, decode and anything between in one kernel.

A layer takes three launches: K and V into the pages (`gpu_write`), attention of every unit (`gpu_units`), and where runs of keys
were split, the merge of their results (`gpu_merge`). A thread block holds a tile of queries, the rows of an item times the
query heads of one KV head, and walks over the keys with an online softmax in float32 (Dao, "FlashAttention-2", 2023).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Case, target
from pallas_kernels.gpu_devices import why_not_capability
from pallas_kernels.numerics import is_invariant
from pallas_kernels.paged_attention.gpu_blocks import Blocks, choose_blocks, power_of_two
from pallas_kernels.paged_attention.gpu_merge import LOG2_E, merge_splits
from pallas_kernels.paged_attention.gpu_units import Part, make_units, partial_slots
from pallas_kernels.paged_attention.gpu_write import write_rows
from pallas_kernels.paged_attention.options import AttentionOptions
from pallas_kernels.paged_attention.pages import CPU_DTYPES, itemsize_of, why_not_plain
from pallas_kernels.paged_attention.plan import AttentionPlan
from pallas_kernels.triton_offsets import why_not_offsets

MAX_HEAD = 256
MASKED = -1e30  # first running maximum: finite, so that a fully masked block gives exp2(-inf) = 0, never NaN


def why_not(case: Case) -> str | None:
    """Refuses all but NVIDIA GPUs from Ampere on with the plain page layout, and pools that Triton cannot address."""
    pages, dtype = case.shapes["pages"], case.dtypes["pages"]
    num_kv_heads, head_dim = case.shapes["k_new"][1:]
    if reason := why_not_plain(pages, num_kv_heads, head_dim, dtype):
        return reason
    if dtype in CPU_DTYPES:
        return f"reads pages of bfloat16 and int8 as such: {dtype} is for the CPU"
    if reason := why_not_offsets(pages, itemsize_of(dtype)):
        return reason
    if head_dim > MAX_HEAD:
        return f"has blocks for head sizes up to {MAX_HEAD}, found {head_dim}"
    float8 = dtype == "float8_e4m3fn"
    return why_not_capability(case.device_kind, (8, 9) if float8 else (8, 0), f"for {dtype} pages")


def dot_dtype(q: Any, pages: Any) -> np.dtype:
    """Returns the type in which queries meet keys: q's where it holds all numbers of the pages, else float32."""
    q, pages = np.dtype(q), np.dtype(pages)
    return q if q.itemsize == 2 and (pages == q or pages.itemsize == 1) else np.dtype(np.float32)


def paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    options: AttentionOptions,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends on a GPU, see `pallas_kernels.paged_attention.paged_attention`. Padding rows give 0.

    `blocks` are the sizes to use; None takes what `gpu_blocks` says. `interpret` runs the kernels in Pallas' interpreter.
    """
    layer, scale, window, softcap, sinks, k_scale, v_scale = options
    arrays = dict(window=window, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    static = dict(scale=scale, softcap=softcap, blocks=blocks, interpret=interpret)
    return _paged_attention(q, k_new, v_new, pages, plan, jnp.asarray(layer, jnp.int32), arrays, **static)


# This is jitted so that the layers of an unrolled loop share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "blocks", "interpret"))
def _paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    layer: jax.Array,
    options: dict[str, Any],
    *,
    scale: float,
    softcap: float | None,
    blocks: Blocks | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    num_heads, (num_kv_heads, head_dim), page_size = q.shape[1], k_new.shape[1:], pages.shape[4]
    group, dtype = num_heads // num_kv_heads, dot_dtype(q.dtype, pages.dtype)
    sizes = dict(num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, page_size=page_size)
    if blocks is None:
        blocks = choose_blocks(plan, target()[1], pages.dtype.name, **sizes, item_bytes=dtype.itemsize)
    pages, out = write_rows(q, k_new, v_new, pages, plan, layer, options["k_scale"], options["v_scale"], interpret)
    return attend(q, pages, out, plan, layer, options, blocks, scale, softcap, interpret), pages


def attend(
    q: jax.Array,
    pages: jax.Array,
    out: jax.Array,
    plan: AttentionPlan,
    layer: jax.Array,
    options: dict[str, Any],
    blocks: Blocks,
    scale: float,
    softcap: float | None,
    interpret: bool,
    part: Part = "all",
) -> jax.Array:
    """Returns `out` with the rows of all items, or of a part of them, set (see `gpu_units.make_units`); the pages hold their
    keys."""
    num_heads, (num_kv_heads, page_size, head_dim) = q.shape[1], pages.shape[3:]
    group, dtype = num_heads // num_kv_heads, dot_dtype(q.dtype, pages.dtype)
    units = make_units(
        plan,
        page_size=page_size,
        group=group,
        tile=blocks.tile,
        split_keys=blocks.split_keys,
        max_splits=blocks.max_splits,
        window=options["window"],
        align_keys=blocks.keys if is_invariant() else 1,
        part=part,
    )
    inputs = {
        "units": units.units,
        "count": units.num_units,
        "block_tables": plan.block_tables,
        "layer": layer.reshape(1),
        "q": q,
        "pages": pages,
        **{name: _as_vector(name, value) for name, value in options.items() if value is not None},
        "out": out,
    }
    outputs = {"out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if blocks.max_splits > 1:
        rows = partial_slots(plan) * blocks.max_splits
        outputs["partial"] = jax.ShapeDtypeStruct((rows, num_kv_heads, group, head_dim), jnp.float32)
        outputs["lse"] = jax.ShapeDtypeStruct((rows, num_kv_heads, group), jnp.float32)
    max_units = units.units.shape[0]
    programs = min(max_units, blocks.programs or max_units)

    def kernel(*refs: Any) -> None:
        ins = dict(zip(inputs, refs, strict=False))
        outs = dict(zip(outputs, refs[len(inputs) :], strict=True))
        _walk(ins, outs, blocks, programs, scale, softcap, dtype)

    results = pl.pallas_call(
        kernel,
        grid=(num_kv_heads, programs),  # thread blocks start in this order: the longest runs of all heads first
        out_shape=tuple(outputs.values()),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=f"paged_attention_{pages.dtype.name}_{head_dim}_{blocks.tile}",
    )(*inputs.values())
    if blocks.max_splits == 1:
        return results[0]
    out, partial, lse = results
    return merge_splits(out, partial, lse, units.merge, blocks.max_splits, options["sinks"], interpret)


def _as_vector(name: str, value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.int32 if name == "window" else jnp.float32).reshape(-1)


def _walk(
    ins: dict[str, Any],
    outs: dict[str, Any],
    blocks: Blocks,
    programs: int,
    scale: float,
    softcap: float | None,
    dtype: np.dtype,
) -> None:
    """Works through all units of this thread block, the longest runs first."""
    count, first, kv_head = ins["count"][0], pl.program_id(1), pl.program_id(0)

    def one(turn: jax.Array, carry: tuple[()]) -> tuple[()]:
        _attend(count - 1 - first - turn * programs, kv_head, ins, outs, blocks, scale, softcap, dtype)
        return carry

    turns = lax.div(count - first + (programs - 1), jnp.int32(programs))
    lax.fori_loop(jnp.int32(0), turns, one, ())


def _attend(
    unit: jax.Array,
    kv_head: jax.Array,
    ins: dict[str, Any],
    outs: dict[str, Any],
    blocks: Blocks,
    scale: float,
    softcap: float | None,
    dtype: np.dtype,
) -> None:
    """Attends for one unit: its tile of queries over its run of pages."""
    pages, block_tables, q_ref = ins["pages"], ins["block_tables"], ins["q"]
    num_kv_heads, page_size, head_dim = pages.shape[3:]
    group = q_ref.shape[1] // num_kv_heads
    layer = ins["layer"][0]
    seq, first_row, rows, first_position, first_query, begin, end, where = (ins["units"][unit, i] for i in range(8))

    query = first_query + jnp.arange(blocks.tile, dtype=jnp.int32)
    row, member = lax.div(query, jnp.int32(group)), lax.rem(query, jnp.int32(group))
    head = kv_head * group + member
    mine = row < rows
    position = first_position + row
    column = jnp.arange(power_of_two(head_dim), dtype=jnp.int32)[None, :]
    in_head = column < head_dim
    mask = mine[:, None] & in_head
    at = (first_row + row)[:, None], head[:, None], column
    tile = plgpu.load(q_ref.at[at], mask=mask, other=0.0).astype(dtype)

    # Rows of the tile see the unit's keys from first_key, where blocks start to count, to before last_key.
    last_row = jnp.minimum(lax.div(first_query + (blocks.tile - 1), jnp.int32(group)), rows - 1)
    last_key = jnp.minimum(end * page_size, first_position + last_row + 1)
    first_key = begin * page_size
    window = ins["window"][0] if "window" in ins else None
    if window is not None:
        oldest = first_position + lax.div(first_query, jnp.int32(group)) - window + 1
        first_key += lax.div(jnp.maximum(oldest - first_key, 0), jnp.int32(blocks.keys)) * blocks.keys
    factor = scale * ins["k_scale"][0] if "k_scale" in ins else scale
    factor, cap = (factor * LOG2_E, None) if softcap is None else (factor / softcap, softcap * LOG2_E)
    precision = lax.Precision.HIGHEST if dtype.itemsize == 4 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def load(which: int, start: jax.Array, edge: bool) -> jax.Array:
        key = start + jnp.arange(blocks.keys, dtype=jnp.int32)
        if page_size % blocks.keys == 0:  # all in one page
            page = block_tables[seq, lax.div(start, jnp.int32(page_size))]
            offset = lax.rem(start, jnp.int32(page_size)) + jnp.arange(blocks.keys, dtype=jnp.int32)[:, None]
        else:
            index = lax.div(key, jnp.int32(page_size))
            page = plgpu.load(block_tables.at[seq, index], mask=key < last_key, other=0)[:, None]
            offset = lax.rem(key, jnp.int32(page_size))[:, None]
        at = pages.at[layer, page, which, kv_head, offset, column]
        if not edge and head_dim == column.size:
            return plgpu.load(at).astype(dtype)
        # What lies past the last key may be anything, NaN included, and 0 * NaN is NaN.
        valid = (key < last_key)[:, None] & in_head if edge else jnp.broadcast_to(in_head, (key.size, column.size))
        return plgpu.load(at, mask=valid, other=jnp.zeros((), pages.dtype)).astype(dtype)

    def block(index: jax.Array, state: tuple[jax.Array, ...], edge: bool) -> tuple[jax.Array, ...]:
        maximum, total, acc = state
        start = first_key + index * blocks.keys
        scores, unit = dot(tile, load(0, start, edge), (((1,), (1,)), ((), ()))), factor
        if cap is not None:
            scores, unit = jnp.tanh(scores * factor) * cap, 1.0
        if edge:
            key = (start + jnp.arange(blocks.keys, dtype=jnp.int32))[None, :]
            visible = (key <= position[:, None]) & (key < last_key)
            if window is not None:
                visible &= key > position[:, None] - window
            scores = jnp.where(visible, scores, -jnp.inf)
        highest = jnp.maximum(maximum, jnp.max(scores, axis=1) * unit)
        weights = jnp.exp2(scores * unit - highest[:, None])  # one multiply-add: the unit is positive
        shrink = jnp.exp2(maximum - highest)
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * shrink[:, None] + dot(weights.astype(dtype), load(1, start, edge), (((1,), (0,)), ((), ())))
        return highest, total, acc

    maximum, total = jnp.full((blocks.tile,), MASKED, jnp.float32), jnp.zeros((blocks.tile,), jnp.float32)
    if "sinks" in ins:  # a key of score `sink` without a value; merging adds it where there are splits
        sink = plgpu.load(ins["sinks"].at[head], mask=mine, other=0.0) * LOG2_E
        maximum, total = jnp.where(where < 0, sink, maximum), jnp.where(where < 0, 1.0, total)
    acc = jnp.zeros((blocks.tile, column.shape[1]), jnp.float32)
    turns = lax.div(jnp.maximum(last_key - first_key, 0) + (blocks.keys - 1), jnp.int32(blocks.keys))
    # Blocks that every row sees whole need no masks; with a window few are.
    seen_by_all = jnp.minimum(last_key, first_position + lax.div(first_query, jnp.int32(group)) + 1) - first_key
    state, edge = (maximum, total, acc), jnp.int32(0)
    if window is None:
        edge = lax.div(jnp.maximum(seen_by_all, 0), jnp.int32(blocks.keys))
        state = lax.fori_loop(jnp.int32(0), edge, functools.partial(block, edge=False), state)
    maximum, total, acc = lax.fori_loop(edge, turns, functools.partial(block, edge=True), state)

    factor = ins["v_scale"][0] if "v_scale" in ins else 1.0
    result = acc * (factor / jnp.where(total > 0, total, 1.0))[:, None]
    plgpu.store(outs["out"].at[at], result.astype(outs["out"].dtype), mask=mask & (where < 0))
    if "partial" in outs:
        lse = jnp.where(total > 0, maximum + jnp.log2(total), MASKED)
        slot = where + row * blocks.max_splits
        partial = mine & (where >= 0)
        at = slot[:, None], kv_head, member[:, None], column
        plgpu.store(outs["partial"].at[at], result, mask=mask & (where >= 0))
        plgpu.store(outs["lse"].at[slot, kv_head, member], lse, mask=partial)
