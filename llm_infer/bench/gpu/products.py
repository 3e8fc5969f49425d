"""Section of the GPU run: products with quantised weights and with experts' matrices, beside XLA's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llm_infer.bench.gpu.section import Row, Setting, seconds_per_call
from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul.cases import BENCHMARKS
from pallas_kernels.scaled_matmul import quantise

KINDS = (("int8", 1), ("float8_e4m3fn", 1), ("int8", 32), ("float8_e4m3fn", 32), ("int4", 32))


def products(setting: Setting) -> Iterator[Row]:
    """Measures time, bandwidth of weights and rate of each implementation, on one layer's matrix of Llama 3.1 8B or of
    experts."""
    features, width = (64, 128) if setting.small else (14_336, 4096)
    dense = jax.random.normal(jax.random.key(0), (1, features, width), jnp.bfloat16)
    for rows in (8,) if setting.small else (1, 16, 64, 256, 2048):
        x = jax.random.normal(jax.random.key(1), (rows, width), jnp.bfloat16)
        for kind, groups in KINDS[-1:] if setting.small else KINDS:
            if setting.seconds_left <= 0:
                return
            stored, scales = quantise(dense, kind, 2 if setting.small else groups)
            names = ("xla",) if groups == 1 else ("gpu_triton", "xla")
            yield from _rows(
                setting, "scaled_matmul", f"{rows} rows, {kind}, {groups} groups", names, (x, stored, scales)
            )
    for name, case in () if setting.small else BENCHMARKS.items():
        if setting.seconds_left <= 0:
            return
        experts = len(case.group_sizes)
        x = jnp.ones((case.rows, case.width), jnp.bfloat16)
        weights = jnp.ones((1, experts * case.features, case.width), jnp.bfloat16)
        arguments = x, weights, jnp.asarray(case.group_sizes, jnp.int32)
        yield from _rows(setting, "grouped_matmul", name, ("gpu_triton", "ragged"), arguments)


def _rows(setting: Setting, op: str, case: str, names: tuple[str, ...], arguments: tuple[Any, ...]) -> Iterator[Row]:
    x, weights = arguments[:2]
    experts = arguments[2].shape[0] if op == "grouped_matmul" else 1
    flops = 2 * x.shape[0] * x.shape[1] * weights.shape[1] // experts
    for name in names:
        options = {"interpret": True} if setting.interpret and name == "gpu_triton" else {}
        program = jax.jit(functools.partial(_first_layer, dispatch.implementation(op, name), **options))
        seconds = seconds_per_call(functools.partial(program, *arguments), rounds=1 if setting.small else 5)
        rates = {"weights GB/s": weights.nbytes / seconds / 1e9, "TFLOP/s": flops / seconds / 1e12}
        yield {"op": op, "case": case, "implementation": name, "µs": 1e6 * seconds, **rates}


def _first_layer(function: Any, *arguments: Any, **options: Any) -> jax.Array:
    return function(*arguments, jnp.int32(0), **options)
