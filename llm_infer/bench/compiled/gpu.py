"""Static record of the GPU kernels: registers, shared memory, occupancy and roofline, from the compiler alone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from llm_infer.base.errors import UserError
from llm_infer.bench.gpu.kernels import B64, GPU_ATTENTION, PREFILL, Shape, abstract_arguments
from pallas_kernels import dispatch
from pallas_kernels.gpu_resources import THREADS, dump_flags, mosaic_variables, read_dump, read_mosaic_dump
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.targets import TARGETS, Target, environment, make_mesh

SHAPES = [
    B64,
    dataclasses.replace(B64, name="decode B=64 ctx=4096, head size 64", head_dim=64),
    dataclasses.replace(B64, name="decode B=64 ctx=4096, float8 pages", page_dtype="float8_e4m3fn"),
    PREFILL[0],
    dataclasses.replace(PREFILL[0], name="prefill 2048, head size 64", head_dim=64),
]
"""Attention of Llama 3.1 8B and of Qwen3 8B (32 query heads over 8 of size 128), and the same with heads of 64."""


def record(
    target: Target, indices: Sequence[int] = range(len(SHAPES))
) -> Iterator[dict[str, str | int | float | None]]:
    """Yields a row for each kernel that a layer of SHAPES[indices] launches, and for each implementation that can run it."""
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(target)
        variables["XLA_FLAGS"] += " " + dump_flags(folder)
        variables |= mosaic_variables(folder)
        command = [sys.executable, "-m", "llm_infer.bench.compiled.gpu", target.name, *map(str, indices)]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the compiler for {target.name} failed: {done.stderr[-2000:]}")
        for program in json.loads(done.stdout.splitlines()[-1]):
            shape = SHAPES[program["shape"]]
            kernels = read_dump(folder, f"jit_{program['name']}", "paged_attention|write_kv|merge_splits")
            if program["implementation"] == "gpu_mosaic":
                main = f"paged_attention_mosaic_{shape.page_dtype}_{shape.head_dim}_"
                kernels += [kernel for kernel in read_mosaic_dump(folder, 256) if kernel.name.startswith(main)]
            for kernel in kernels:
                main = kernel.name.startswith("paged_attention")
                blocks = kernel.blocks_per_multiprocessor
                yield {
                    "shape": shape.name,
                    "implementation": program["implementation"],
                    "kernel": kernel.name,
                    "grid": "×".join(map(str, kernel.grid)) or None,
                    "registers": kernel.registers,
                    "spill B": kernel.spill_bytes,
                    "shared KB": kernel.shared_bytes / 1024,
                    "blocks per SM": blocks,
                    "occupancy": blocks * kernel.threads / THREADS,
                    "KV MB": shape.kv_bytes / 1e6 if main else None,
                    "GFLOP": shape.flops / 1e9 if main else None,
                    "roofline µs": 1e6 * roofline(shape, target) if main else None,
                }


def roofline(shape: Shape, target: Target) -> float:
    """Returns the seconds that a layer needs at least: for reading K and V once, or for the products."""
    return max(shape.kv_bytes / target.bytes_per_s, shape.flops / target.flops)


def _compile_all(target: Target, indices: Sequence[int]) -> None:
    """Compiles every program, in the process in which the compiler runs, and prints their names as JSON."""
    mesh = make_mesh(target)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    programs = []
    for index in indices:
        shape = SHAPES[index]
        arguments = abstract_arguments(shape)
        arrays = dict(zip(("pages", "q", "k_new"), arguments, strict=False)) | arguments[4]._asdict()
        case = dispatch.Case(
            *(target.platform, target.device_kind),
            {name: tuple(array.shape) for name, array in arrays.items()},
            {name: array.dtype.name for name, array in arrays.items()},
            {
                "q_block": arguments[4].q_block,
                "window": None,
                "softcap": None,
                "sinks": False,
                "kv_scales": bool(arguments[5]),
            },
        )
        for implementation in GPU_ATTENTION:
            if implementation.why_not(case) is not None:
                continue
            attend = by_keyword(dispatch.implementation("paged_attention", implementation.name))

            def layer(pages, q, k, v, plan, scales, attend=attend):
                return attend(q, k, v, pages, plan, layer=jnp.int32(0), scale=0.088, **scales)

            layer.__name__ = f"{implementation.name}_{index}"
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jitted = jax.jit(layer, donate_argnums=0, in_shardings=sharding, out_shardings=sharding)
                jitted.lower(*arguments).compile()
            programs.append({"name": layer.__name__, "shape": index, "implementation": implementation.name})
    print(json.dumps(programs))


if __name__ == "__main__":
    _compile_all(TARGETS[sys.argv[1]], [int(index) for index in sys.argv[2:]])
