"""The Mosaic GPU decode kernel for Hopper: pages by TMA into a ring of buffers, wgmma, partial results of each unit.

Two warpgroups: one starts the copies of pages, across the borders of units; the other multiplies. The query heads of a group
are the first rows of a tile of 64, the least that wgmma takes: rows do not mix, and the others are never stored. Every
unit leaves a normalised result and its log-sum-exp (`gpu_units`, part "one"); `gpu_merge` puts them together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_merge import LOG2_E

TILE = 64
"""Rows of a tile, and keys of a block."""
MASKED = -1e30


@dataclass(frozen=True)
class Static:
    """Values fixed while compiling. `twins` puts plain products in place of what cannot be interpreted."""

    stages: int
    programs: int
    scale: float
    softcap: float | None
    twins: bool


def attend_one_row(
    units: jax.Array,
    count: jax.Array,
    block_tables: jax.Array,
    layer: jax.Array,
    window: jax.Array,
    q: jax.Array,
    pages: jax.Array,
    *,
    slots: int,
    static: Static,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns partial results [slots Hkv G' D] and their base-2 log-sum-exps [slots Hkv G'], both float32.

    Args:
        units, count: from `make_units` with part "one".
        block_tables: Int32[Array, "S B"].
        layer, window: Int32[Array, " 1"].
        q: Float[Array, "T Hkv G' D"], G' = heads of a group padded to a multiple of 8.
        pages: the pool, in q's dtype.
        slots: rows of partial results.
        static: see `Static`.
        interpret: `InterpretGPUParams` for running on the CPU.
    """
    num_kv_heads, padded, head_dim = q.shape[1:]
    tiling = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    ring = plgpu.SMEM((static.stages, TILE, head_dim), q.dtype, transforms=tiling)
    barriers = plgpu.Barrier(num_barriers=static.stages)
    scratch = dict(
        q_smem=plgpu.SMEM((TILE, head_dim), q.dtype, transforms=tiling),
        k_smem=ring,
        v_smem=ring,
        out_smem=plgpu.SMEM((TILE, head_dim), jnp.float32),
        lse_smem=plgpu.SMEM((TILE,), jnp.float32),
        q_ready=plgpu.Barrier(),
        q_free=plgpu.Barrier(),
        k_ready=barriers,
        v_ready=barriers,
        k_free=barriers,
        v_free=barriers,
    )
    return plgpu.kernel(
        functools.partial(_body, static),
        out_type=(
            jax.ShapeDtypeStruct((slots, num_kv_heads, padded, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((slots, num_kv_heads, padded), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(static.programs, num_kv_heads),
        grid_names=("program", "kv_head"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=f"paged_attention_mosaic_{pages.dtype.name}_{head_dim}",
    )(units, count, block_tables, layer, window, q, pages)


@dataclass(frozen=True)
class _Unit:
    """Scalars of a unit."""

    seq: jax.Array
    row: jax.Array
    position: jax.Array
    where: jax.Array
    first_key: jax.Array
    last_key: jax.Array

    @property
    def blocks(self) -> jax.Array:
        return lax.div(jnp.maximum(self.last_key - self.first_key, 0) + (TILE - 1), jnp.int32(TILE))


def _unit(units_ref, window_ref, index: jax.Array, page_size: int) -> _Unit:
    seq, row, position, begin, end, where = (units_ref[index, column] for column in (0, 1, 3, 5, 6, 7))
    first_key, last_key = begin * page_size, jnp.minimum(end * page_size, position + 1)
    behind = jnp.maximum(position - window_ref[0] + 1 - first_key, 0)
    return _Unit(seq, row, position, where, first_key + lax.div(behind, jnp.int32(TILE)) * TILE, last_key)


def _body(static: Static, units_ref, count_ref, tables_ref, layer_ref, window_ref, q_ref, pages_ref, *refs, **scratch):
    program, kv_head = lax.axis_index("program"), lax.axis_index("kv_head")
    count = count_ref[0]
    turns = lax.div(count - program + (static.programs - 1), jnp.int32(static.programs))
    unit_of = functools.partial(_unit, units_ref, window_ref, page_size=pages_ref.shape[4])

    def index(turn: jax.Array) -> jax.Array:  # the longest runs come first
        return count - 1 - program - turn * static.programs

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _producer() -> None:
        def one(turn: jax.Array, step: jax.Array) -> jax.Array:
            unit = unit_of(index(turn))

            @pl.when(turn > 0)
            def _wait() -> None:
                plgpu.barrier_wait(scratch["q_free"])

            padded = q_ref.shape[2]
            plgpu.copy_gmem_to_smem(
                q_ref.at[unit.row, kv_head], scratch["q_smem"].at[pl.ds(0, padded)], scratch["q_ready"]
            )
            return lax.fori_loop(
                jnp.int32(0),
                unit.blocks,
                lambda block, step: _copy_block(
                    static, tables_ref, layer_ref, pages_ref, kv_head, unit, block, step, scratch
                ),
                step,
            )

        lax.fori_loop(jnp.int32(0), turns, one, jnp.int32(0))

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _consumer() -> None:
        def one(turn: jax.Array, step: jax.Array) -> jax.Array:
            return _attend(static, unit_of(index(turn)), window_ref, kv_head, step, refs, scratch)

        lax.fori_loop(jnp.int32(0), turns, one, jnp.int32(0))


def _copy_block(static, tables_ref, layer_ref, pages_ref, kv_head, unit: _Unit, block, step, scratch) -> jax.Array:
    """Starts the copies of a block's K and V once its place in the ring is free."""
    page_size = pages_ref.shape[4]
    key = unit.first_key + block * TILE
    page = tables_ref[unit.seq, lax.div(key, jnp.int32(page_size))]
    offset = pl.multiple_of(lax.rem(key, jnp.int32(page_size)), TILE)
    place = lax.rem(step, jnp.int32(static.stages))
    for which, name in enumerate("kv"):

        @pl.when(step >= static.stages)
        def _wait(name: str = name) -> None:
            plgpu.barrier_wait(scratch[f"{name}_free"].at[place])

        plgpu.copy_gmem_to_smem(
            pages_ref.at[layer_ref[0], page, which, kv_head, pl.ds(offset, TILE)],
            scratch[f"{name}_smem"].at[place],
            scratch[f"{name}_ready"].at[place],
        )
    return step + 1


def _attend(static: Static, unit: _Unit, window_ref, kv_head, step, refs, scratch) -> jax.Array:
    """Attends for one unit: online softmax over its blocks, result and log-sum-exp into the partial arrays."""
    partial_ref, lse_ref = refs
    head_dim, padded = partial_ref.shape[3], partial_ref.shape[2]
    k_smem, v_smem = scratch["k_smem"], scratch["v_smem"]
    wide, row_wise = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    plgpu.barrier_wait(scratch["q_ready"])

    def block(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, maximum, total, step = state
        place = lax.rem(step, jnp.int32(static.stages))
        plgpu.barrier_wait(scratch["k_ready"].at[place])
        scores = _scores(static, scratch["q_smem"], k_smem.at[place])
        plgpu.barrier_arrive(scratch["k_free"].at[place])
        if static.softcap is None:
            scores = scores * (static.scale * LOG2_E)
        else:
            scores = jnp.tanh(scores * (static.scale / static.softcap)) * (static.softcap * LOG2_E)
        first = unit.first_key + index * TILE
        key = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=wide) + first
        visible = (key < unit.last_key) & (key > unit.position - window_ref[0])
        scores = jnp.where(visible, scores, -jnp.inf)
        highest = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(highest, scores.shape, [0]))
        shrink = jnp.exp2(maximum - highest)
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        plgpu.barrier_wait(scratch["v_ready"].at[place])

        @pl.when(first + TILE > unit.last_key)
        def _clear() -> None:  # what lies past the last key may be NaN, and 0 * NaN is NaN
            value = plgpu.load(v_smem.at[place], layout=wide)  # pyright: ignore (jax < 0.11 wants an index too)
            row = plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=wide) + first
            v_smem.at[place][...] = jnp.where(row < unit.last_key, value, jnp.zeros_like(value))
            plgpu.commit_smem()

        acc = _add_values(static, acc, weights.astype(v_smem.dtype), v_smem.at[place])
        plgpu.barrier_arrive(scratch["v_free"].at[place])
        return acc, highest, total, step + 1

    acc = plgpu.layout_cast(jnp.zeros((TILE, head_dim), jnp.float32), wide)
    maximum = plgpu.layout_cast(jnp.full((TILE,), MASKED, jnp.float32), row_wise)
    total = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), row_wise)
    acc, maximum, total, step = lax.fori_loop(jnp.int32(0), unit.blocks, block, (acc, maximum, total, step))
    plgpu.barrier_arrive(scratch["q_free"])

    some = total > 0
    divisor = jnp.where(some, total, jnp.ones_like(total))
    scratch["out_smem"][...] = acc / lax.broadcast_in_dim(divisor, acc.shape, [0])
    scratch["lse_smem"][...] = jnp.where(some, maximum + jnp.log(divisor) * LOG2_E, MASKED)
    plgpu.commit_smem()
    mine = pl.ds(0, padded)
    plgpu.copy_smem_to_gmem(scratch["out_smem"].at[mine], partial_ref.at[unit.where, kv_head])
    plgpu.copy_smem_to_gmem(scratch["lse_smem"].at[mine], lse_ref.at[unit.where, kv_head])
    plgpu.wait_smem_to_gmem(0)
    return step


def _scores(static: Static, q_smem, k_smem) -> jax.Array:
    """Returns q @ k.T in float32. The twin is a plain product: the interpreter does not transpose a buffer in place."""
    if static.twins:
        return lax.dot_general(q_smem[...], k_smem[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def product(acc_ref) -> jax.Array:
        plgpu.wgmma(acc_ref, q_smem, k_smem.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32))  # pyright: ignore[reportPrivateImportUsage]


def _add_values(static: Static, acc: jax.Array, weights: jax.Array, v_smem) -> jax.Array:
    """Returns acc + weights @ v. The twin is a plain product: the interpreter takes no wgmma of registers, nor does it start one
    at `acc`."""
    if static.twins:
        return acc + lax.dot_general(weights, v_smem[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def product(acc_ref) -> None:
        plgpu.wgmma(acc_ref, weights, v_smem)

    return pl.run_state(product)(plgpu.ACC.init(acc))  # pyright: ignore (ACC is public, the state it returns an array)
