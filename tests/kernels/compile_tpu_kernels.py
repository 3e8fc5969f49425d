"""Program of test_tpu_compile: compiles variants of the attention kernel, and copy_pages, and prints a line of JSON for each."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import dispatch, tpu_schedule
from pallas_kernels.paged_attention import (
    AttentionPlan,
    PlanShape,
    copy_pages,
    kv_pool_shape,
    paged_attention,
    plan_fields,
)
from pallas_kernels.paged_attention.tpu_blocks import choose_blocks
from pallas_kernels.targets import TARGETS, make_mesh

LAYERS, PAGES = 4, 2048


def compiled(mesh: Any, function: Any, arguments: tuple[Any, ...], donate: int) -> Any:
    placed = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, in_shardings=placed, donate_argnums=donate).lower(*arguments).compile()


def attention(
    mesh: Any,
    *,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 64,
    dtype: str = "bfloat16",
    q_dtype: str = "bfloat16",
    tokens: int = 64,
    q_block: int = 64,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    scales: bool = False,
) -> dict[str, Any]:
    """Compile a call of the op as a TPU chooses it."""
    array = jax.ShapeDtypeStruct
    sizes = dict(num_layers=LAYERS, num_pages=PAGES, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    pool = array(kv_pool_shape("tpu", dtype=dtype, **sizes), jnp.dtype(dtype))
    q, kv = (array((tokens, heads, head_dim), jnp.dtype(q_dtype)) for heads in (num_heads, num_kv_heads))
    fields = plan_fields(PlanShape(tokens, 64, 4096 // page_size, q_block))
    plan = AttentionPlan(**{name: array(dims, jnp.int32) for name, dims in fields.items()})
    extra = {"window": array((), jnp.int32)} if window else {}
    extra |= {"sinks": array((num_heads,), jnp.float32)} if sinks else {}
    extra |= {name: array((), jnp.float32) for name in ("k_scale", "v_scale") if scales}

    def call(q: Any, k: Any, v: Any, pages: Any, plan: Any, layer: Any, extra: Any) -> Any:
        return paged_attention(q, k, v, pages, plan, layer=layer, scale=head_dim**-0.5, softcap=softcap, **extra)

    program = compiled(mesh, call, (q, kv, kv, pool, plan, array((), jnp.int32), extra), 3)
    return summary(program, pool) | {"choice": "tpu" if "tpu_custom_call" in program.as_text() else "other"}


def summary(program: Any, pool: Any) -> dict[str, Any]:
    memory = program.memory_analysis()
    scoped = [int(size) for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', program.as_text())]
    return {
        "pool": int(np.prod(pool.shape)) * pool.dtype.itemsize,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "scoped_memory": max(scoped, default=0),
    }


def inner_loops(directory: Path) -> dict[str, tuple[float, float]]:
    """What a block of tokens executes of each phase: bundles, and fills and spills, its pages and tiles included."""
    loops = tpu_schedule.read(directory, "paged_attention")
    tiles = [(4 * 32 // _tile_rows(), [])]
    phases = {
        "decode": (loops.inner[2].inner[1], [(4, [])]),
        "prefill": (loops.inner[4].inner[1], [(8, []), (8, tiles)]),  # pages; heads in turn, each with its tiles
    }
    counted = (tpu_schedule.cycles, tpu_schedule.spilled)
    return {name: tuple(count(*phase) for count in counted) for name, phase in phases.items()}


def _tile_rows() -> int:
    array = jax.ShapeDtypeStruct
    kind = dispatch.target()[1]
    pages = array(
        kv_pool_shape("tpu", num_layers=1, num_pages=2, page_size=64, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
        jnp.bfloat16,
    )
    return choose_blocks(kind, pages, 128, 4, 128).tile_rows


def main(name: str, variants: dict[str, dict[str, Any]], directory: str) -> None:
    mesh = make_mesh(TARGETS[name])
    for variant, arguments in variants.items():
        row = {"name": variant, **attention(mesh, **arguments)}
        if directory:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                row["counts"] = inner_loops(Path(directory))
        print(json.dumps(row), flush=True)
    if not directory:
        print(json.dumps({"name": "copy_pages", **copy(mesh)}))


def copy(mesh: Any) -> dict[str, Any]:
    """Compile copy_pages as a TPU chooses it."""
    array = jax.ShapeDtypeStruct
    shape = kv_pool_shape(
        "tpu", num_layers=LAYERS, num_pages=PAGES, page_size=64, num_kv_heads=8, head_dim=128, dtype="bfloat16"
    )
    pool, ids = array(shape, jnp.bfloat16), array((8,), jnp.int32)
    program = compiled(mesh, copy_pages, (pool, ids, ids, array((), jnp.int32)), 0)
    return summary(program, pool) | {"choice": "tpu" if "tpu_custom_call" in program.as_text() else "other"}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
