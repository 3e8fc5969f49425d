"""row_sums on a GPU through Pallas' Triton lowering: a thread block adds up a row, chunk by chunk."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Case
from pallas_kernels.gpu_devices import why_not_capability
from pallas_kernels.row_sums.gradients import differentiable
from pallas_kernels.row_sums.xla import OF

CHUNK = 1024
"""Numbers that a thread block adds at once."""


def why_not(case: Case) -> str | None:
    """Refuses programs that do not ask for the same bits: there XLA's sums are fused with what is around them."""
    if not case.options.get("invariant"):
        return "is for numerics='invariant'"
    return why_not_capability(case.device_kind, (8, 0), "for Triton")


def row_sums(x: jax.Array, shift: jax.Array, kind: str, *, interpret: bool = False) -> jax.Array:
    """Adds up, see `pallas_kernels.row_sums.row_sums`; x is [R, E]. `interpret` runs it in Pallas' interpreter."""
    return differentiable(partial(_sums, kind=kind, interpret=interpret), kind, x, shift)


def _sums(x: jax.Array, shift: jax.Array, *, kind: str, interpret: bool) -> jax.Array:
    rows, features = x.shape
    chunk = min(CHUNK, pl.next_power_of_2(features))
    return pl.pallas_call(
        partial(_kernel, kind, features, chunk),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows,), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name=f"row_sums_{kind}",
    )(x, shift)


def _kernel(kind: str, features: int, chunk: int, x_ref: Any, shift_ref: Any, out_ref: Any) -> None:
    row = pl.program_id(0)
    shift = shift_ref[row]

    def add(step: jax.Array, acc: jax.Array) -> jax.Array:
        column = step * chunk + jnp.arange(chunk, dtype=jnp.int32)
        inside = column < features
        numbers = plgpu.load(x_ref.at[row, column], mask=inside, other=0.0)
        return acc + jnp.where(inside, OF[kind](numbers - shift), 0.0)

    acc = lax.fori_loop(jnp.int32(0), jnp.int32(pl.cdiv(features, chunk)), add, jnp.zeros((chunk,), jnp.float32))
    out_ref[row] = jnp.sum(acc)
