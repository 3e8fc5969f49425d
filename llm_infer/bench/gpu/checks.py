"""Section of the GPU run: every GPU kernel against the reference on the shared cases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.bench.gpu.kernels import GPU_ATTENTION
from llm_infer.bench.gpu.section import Row, Setting, in_threads
from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.grouped_matmul import gpu_triton as grouped_triton
from pallas_kernels.grouped_matmul import reference as grouped_reference
from pallas_kernels.paged_attention import gpu_copy, reference
from pallas_kernels.paged_attention.cases import CASES, AttentionCase, Inputs, build
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.paged_attention.pages import CPU_DTYPES
from pallas_kernels.scaled_matmul import gpu_triton as scaled_triton
from pallas_kernels.scaled_matmul import quantise
from pallas_kernels.scaled_matmul import reference as scaled_reference

TOLERANCE = {"float32": 2e-5, "bfloat16": 1.5e-2}


def correctness(setting: Setting) -> Iterator[Row]:
    """Yields each implementation's largest difference from the reference in each case; `ok` says whether it is small enough."""
    names = [name for name, case in CASES.items() if case.sizes.page_dtype not in CPU_DTYPES]
    for rows in in_threads(functools.partial(_check_attention, setting), names[-1:] if setting.small else names):
        yield from rows
    yield {"op": "copy_pages", "case": "", "implementation": "gpu_triton"} | _reported(lambda: _check_copy(setting))
    for name in ("uneven_and_empty",) if setting.small else tuple(grouped_cases.CASES):
        x, weights, sizes = grouped_cases.build(grouped_cases.CASES[name])
        arguments = x, weights, sizes, np.int32(grouped_cases.LAYER)
        row = {"op": "grouped_matmul", "case": name, "implementation": "gpu_triton"}
        kernels = grouped_triton.grouped_matmul, grouped_reference.grouped_matmul
        yield row | _reported(functools.partial(_check_product, setting, *kernels, arguments))
    for kind in ("int4",) if setting.small else ("int8", "int4", "float8_e4m3fn", "float8_e5m2"):
        x, weights = (jax.random.normal(jax.random.key(i), (n, 512), jnp.float32) for i, n in enumerate((33, 96)))
        stored, scales = quantise(weights[None], kind, 4)
        arguments = x.astype(jnp.bfloat16), stored, scales, np.int32(0)
        row = {"op": "scaled_matmul", "case": kind, "implementation": "gpu_triton"}
        kernels = scaled_triton.scaled_matmul, scaled_reference.scaled_matmul
        yield row | _reported(functools.partial(_check_product, setting, *kernels, arguments))


def _check_attention(setting: Setting, name: str) -> list[Row]:
    inputs = build(CASES[name])
    expected = _reference(inputs)
    return [
        {"op": "paged_attention", "case": name, "implementation": implementation.name}
        | _reported(lambda each=implementation: _check(setting, each, CASES[name], inputs, *expected))
        for implementation in GPU_ATTENTION
    ]


def _reported(check: Callable[[], Row]) -> Row:
    """Returns what a check finds; an error is a finding of that check alone."""
    try:
        return check()
    except Exception as error:
        return {"ok": False, "error": None, "note": f"{type(error).__name__}: {str(error)[:300]}"}


def _check_product(setting: Setting, function: Any, oracle: Any, arguments: tuple[Any, ...]) -> Row:
    with jax.default_device(jax.devices("cpu")[0]):
        expected = np.asarray(jax.jit(oracle)(*map(np.asarray, arguments)), np.float32)
    found = np.asarray(jax.jit(functools.partial(function, interpret=setting.interpret))(*arguments), np.float32)
    limit = TOLERANCE["float32" if arguments[0].dtype == np.float32 else "bfloat16"]
    error = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
    return {"ok": bool(error <= limit), "error": float(error), "note": "relative to the largest"}


def _reference(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Computes the reference on the CPU, where float32 is float32."""
    with jax.default_device(jax.devices("cpu")[0]):
        call = jax.jit(functools.partial(by_keyword(reference.paged_attention), scale=inputs.scale, **inputs.options))
        out, pages = call(inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan, **inputs.arrays)
        return np.asarray(out), np.asarray(pages)


def _check(
    setting: Setting,
    implementation: dispatch.Implementation,
    case: AttentionCase,
    inputs: Inputs,
    expected: np.ndarray,
    expected_pages: np.ndarray,
) -> Row:
    arrays = {"pages": inputs.pages, "k_new": inputs.k_new, "q": inputs.q, **inputs.plan._asdict()}
    device = "NVIDIA H200" if setting.interpret else jax.devices()[0].device_kind
    options = {
        "q_block": inputs.plan.q_block,
        "window": inputs.options.get("window"),
        "softcap": inputs.options.get("softcap"),
        "sinks": case.sinks,
        "kv_scales": case.kv_scales is not None,
    }
    asked = dispatch.Case(
        "gpu",
        device,
        {name: array.shape for name, array in arrays.items()},
        {name: array.dtype.name for name, array in arrays.items()},
        options,
    )
    if reason := implementation.why_not(asked):
        return {"ok": None, "error": None, "note": reason}
    function = by_keyword(dispatch.implementation("paged_attention", implementation.name))
    more: dict[str, Any] = {"interpret": True} if setting.interpret else {}
    call = jax.jit(functools.partial(function, scale=inputs.scale, **inputs.options, **more))
    out, pages = call(inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan, **inputs.arrays)
    rows = sum(q_len for q_len, _ in case.batch)
    error = np.abs(np.asarray(out)[:rows].astype(np.float32) - expected[:rows].astype(np.float32)).max(initial=0.0)
    found = np.asarray(pages)[:, 1:]
    # Where a quotient lies between two 8-bit numbers, a division that rounds differently may choose the other one.
    kind = f"u{found.dtype.itemsize}"
    unequal = int(np.count_nonzero(found.view(kind) != expected_pages[:, 1:].view(kind)))
    limit = TOLERANCE["bfloat16" if case.sizes.dtype == "bfloat16" else "float32"]
    fits = (
        bool(error <= limit)
        and unequal <= found.size // 10_000
        and bool(np.isfinite(np.asarray(out, np.float32)).all())
    )
    return {"ok": fits, "error": float(error), "note": f"{unequal} numbers of pages differ" if unequal else ""}


def _check_copy(setting: Setting) -> Row:
    pool = np.random.default_rng(0).standard_normal((4, 32, 2, 2, 64, 128)).astype(np.float32)
    expected = pool.copy()
    expected[:, 8:11] = pool[:, 1:4]
    src, dst = jnp.arange(1, 9, dtype=jnp.int32), jnp.arange(8, 16, dtype=jnp.int32)
    call = jax.jit(functools.partial(gpu_copy.copy_pages, interpret=setting.interpret), donate_argnums=0)
    found = np.asarray(call(jnp.asarray(pool, jnp.bfloat16), src, dst, jnp.int32(3)))
    return {"ok": bool((found == np.asarray(jnp.asarray(expected, jnp.bfloat16))).all()), "error": None, "note": ""}
