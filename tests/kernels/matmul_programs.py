"""Compiles matrix products of production size for the chip argv[1], prints their temporaries as JSON. Run in its own process.

More arguments are names of programs; without them all are compiled.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.cases import BENCHMARKS
from pallas_kernels.scaled_matmul import scaled_matmul
from pallas_kernels.targets import TARGETS, make_mesh

Array = jax.ShapeDtypeStruct
target = TARGETS[sys.argv[1]]
on_gpu = target.platform == "gpu"
mesh = make_mesh(target)
replicated = NamedSharding(mesh, PartitionSpec())
found = {}


def compile_one(name: str, function, *arguments) -> None:
    if sys.argv[2:] and name not in sys.argv[2:]:
        return
    function.__name__ = name
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function, in_shardings=replicated, out_shardings=replicated).lower(*arguments).compile()
    found[name] = compiled.memory_analysis().temp_size_in_bytes


layer = Array((), jnp.int32)
for name, case in zip(("grouped_decode", "grouped_prefill"), BENCHMARKS.values(), strict=True):
    experts = len(case.group_sizes)
    x, weights = Array((case.rows, case.width), jnp.bfloat16), (2, experts * case.features, case.width)
    sizes = Array((experts,), jnp.int32)
    compile_one(name, lambda *a: grouped_matmul(*a), x, Array(weights, jnp.bfloat16), sizes, layer)

# An MLP matrix of Llama 3.1 8B: 112 MB in bfloat16.
for name, rows, dtype, groups in (
    ("int4_decode", 64, jnp.uint8, 32),
    ("int4_prefill", 2048, jnp.uint8, 32),
    ("int8_decode", 8, jnp.int8, 32),
    ("float8_decode", 64, jnp.float8_e4m3fn, 32),
    ("int8_per_channel", 64, jnp.int8, 1),
    ("float8_per_channel", 64, jnp.float8_e4m3fn, 1),
):
    x, scales = Array((rows, 4096), jnp.bfloat16), Array((2, 14_336, groups), jnp.float32)
    weights = Array((2, 14_336, 4096 // (2 if dtype == jnp.uint8 else 1)), dtype)
    if groups == 1 and on_gpu:  # XLA does not fuse the slice of a layer that it learns at run time; layers are unrolled
        compile_one(name, lambda *a: scaled_matmul(*a, jnp.int32(1)), x, weights, scales)
    else:
        compile_one(name, lambda *a: scaled_matmul(*a), x, weights, scales, layer)
print(json.dumps(found))
