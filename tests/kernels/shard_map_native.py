"""Run by test_cpu_attention in a process of its own: native kernels under shard_map on four fake CPU devices at once.

Pages and batch over `dp`, heads over `tp`; the pool is donated. Prints "same" when the result equals the unsharded one.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.paged_attention import cpu as attention
from pallas_kernels.paged_attention.cases import CASES, build
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.quant_matmul import cpu as matmul
from pallas_kernels.quant_matmul.cases import random_blocks, random_rows

spec = PartitionSpec
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("dp", "tp"))
case = CASES["mixed"]
inputs = build(case)


def attend(q, k, v, pages, plan):
    plan = jax.tree.map(lambda x: x[0], plan)
    return by_keyword(attention.paged_attention)(q, k, v, pages, plan, layer=jnp.int32(1), scale=inputs.scale)


def double(x, axis):
    return np.concatenate([x, x], axis)


heads = spec("dp", "tp")
pool = spec(None, "dp", None, "tp")
sharded = jax.jit(
    jax.shard_map(attend, mesh=mesh, in_specs=(heads, heads, heads, pool, spec("dp")), out_specs=(heads, pool)),
    donate_argnums=3,
)
args = [double(x, 0) for x in (inputs.q, inputs.k_new, inputs.v_new)]
plan = jax.tree.map(lambda x: np.stack([x, x]), inputs.plan)
alone, alone_pages = jax.jit(by_keyword(attention.paged_attention), static_argnames="scale")(
    inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan, layer=jnp.int32(1), scale=inputs.scale
)
for _ in range(20):
    out, pages = sharded(*args, double(inputs.pages, 1), plan)
    np.testing.assert_array_equal(np.asarray(out), double(np.asarray(alone), 0))
    np.testing.assert_array_equal(np.asarray(pages)[:, 1 : alone_pages.shape[1]], np.asarray(alone_pages)[:, 1:])

x, blocks = random_rows(8, 256), random_blocks("q4_1", 2, 64, 256)
column = jax.jit(
    jax.shard_map(
        lambda x, blocks: matmul.quant_matmul(x, blocks, jnp.int32(1), kind="q4_1"),
        mesh=mesh,
        in_specs=(spec("dp"), spec(None, "tp")),
        out_specs=spec("dp", "tp"),
    )
)
expected = np.asarray(matmul.quant_matmul(jnp.asarray(x), jnp.asarray(blocks), jnp.int32(1), kind="q4_1"))
for _ in range(50):
    np.testing.assert_array_equal(np.asarray(column(x, blocks)), expected)
print("same")
