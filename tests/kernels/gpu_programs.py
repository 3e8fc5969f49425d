"""Compiles the GPU programs that its argument names (JSON) for an H200, prints their memory as JSON. Run in its own process."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.draw_tokens import Limits, draw_tokens
from pallas_kernels.paged_attention import AttentionPlan, PlanShape, copy_pages, paged_attention, plan_fields
from pallas_kernels.targets import TARGETS, make_mesh

Array = jax.ShapeDtypeStruct
mesh = make_mesh(TARGETS["sm_90"])
replicated = NamedSharding(mesh, PartitionSpec())


def compile_one(name: str, step, *arguments) -> dict[str, int]:
    step.__name__ = name
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(step, donate_argnums=0, in_shardings=replicated, out_shardings=replicated)
        memory = jitted.lower(*arguments).compile().memory_analysis()
    pool = int(np.prod(arguments[0].shape)) * arguments[0].dtype.itemsize
    return {"pool": pool, "alias": memory.alias_size_in_bytes, "temporary": memory.temp_size_in_bytes}


def attention(
    name: str, tokens: int, dtype: str, head_dim: int, page_size: int, heads: int, kv_heads: int, kernel: str
):
    """One layer; programs of 8-bit pages have scales, prefills have a window, a softcap and sinks."""
    shape = PlanShape(tokens, min(tokens, 64), 8192 // page_size, min(32, tokens))
    plan = AttentionPlan(**{field: Array(dims, jnp.int32) for field, dims in plan_fields(shape).items()})
    pool = Array((4, 262_144 // page_size, 2, kv_heads, page_size, head_dim), jnp.dtype(dtype))
    compute = jnp.float32 if dtype == "float32" else jnp.bfloat16
    q, kv = Array((tokens, heads, head_dim), compute), Array((tokens, kv_heads, head_dim), compute)
    scalar = Array((), jnp.float32)
    arrays = {"k_scale": scalar, "v_scale": scalar} if jnp.dtype(dtype).itemsize == 1 else {}
    options = {"window": 1024, "softcap": 30.0} if name.startswith("prefill_") else {}
    if name.startswith("prefill_"):
        arrays["sinks"] = Array((heads,), jnp.float32)

    def step(pages, q, k, v, plan, arrays):
        return paged_attention(
            q, k, v, pages, plan, layer=jnp.int32(1), scale=0.1, implementation=kernel, **options, **arrays
        )

    return compile_one(name, step, pool, q, kv, kv, plan, arrays)


found = {name: attention(name, *sizes, kernel=sys.argv[2]) for name, sizes in json.loads(sys.argv[1]).items()}
ids = Array((64,), jnp.int32)
pool = Array((4, 4096, 2, 8, 64, 128), jnp.bfloat16)


def copy(pages, src, dst, count):
    return copy_pages(pages, src, dst, count)


limits = Limits(*(Array((64,), jnp.int32 if name == "top_k" else jnp.float32) for name in Limits._fields))


def draw(logits, limits, uniform):
    return logits, draw_tokens(logits, limits, uniform)  # the first result for what is given away


found["draw"] = compile_one("draw", draw, Array((64, 128_256), jnp.float32), limits, Array((64,), jnp.float32))
found["copy"] = compile_one("copy", copy, pool, ids, ids, Array((), jnp.int32))
print(json.dumps(found))
