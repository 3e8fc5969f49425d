"""copy_pages on a GPU (Triton), in place. XLA's loop makes the host wait for its counter; this kernel reads it itself."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Case
from pallas_kernels.gpu_devices import why_not_capability
from pallas_kernels.paged_attention.pages import itemsize_of
from pallas_kernels.triton_offsets import why_not_offsets

PROGRAMS = 264
"""Thread blocks, two for each multiprocessor of an H200."""
CHUNK = 4096
"""Numbers that a thread block moves at a time."""


def why_not(case: Case) -> str | None:
    """Refuses all but NVIDIA GPUs and pools that Triton can address; all layouts have their pages on axis 1."""
    if reason := why_not_offsets(case.shapes["pages"], itemsize_of(case.dtypes["pages"])):
        return reason
    return why_not_capability(case.device_kind, (8, 0), "for Triton")


def copy_pages(
    pages: jax.Array, src: jax.Array, dst: jax.Array, count: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Copies on a GPU, see `pallas_kernels.paged_attention.copy_pages`. A thread block takes pairs of (page, layer) in turn."""
    layers, num_pages = pages.shape[:2]
    flat = pages.reshape(layers, num_pages, math.prod(pages.shape[2:]))
    out = pl.pallas_call(
        _kernel,
        grid=(min(PROGRAMS, src.shape[0] * layers),),
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="copy_pages",
    )(src, dst, count.reshape(1), flat)
    return out.reshape(pages.shape)


def _kernel(src_ref, dst_ref, count_ref, pages_ref, out_ref) -> None:
    layers, _, size = pages_ref.shape
    first, programs = pl.program_id(0), min(PROGRAMS, src_ref.shape[0] * layers)
    work = count_ref[0] * layers

    def one(turn: jax.Array, carry: tuple[()]) -> tuple[()]:
        index = first + turn * programs
        pair, layer = lax.div(index, jnp.int32(layers)), lax.rem(index, jnp.int32(layers))
        source, target = src_ref[pair], dst_ref[pair]

        def move(chunk: jax.Array, carry: tuple[()]) -> tuple[()]:
            at = chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
            value = plgpu.load(pages_ref.at[layer, source, at], mask=at < size, other=jnp.zeros((), pages_ref.dtype))
            plgpu.store(out_ref.at[layer, target, at], value, mask=at < size)
            return carry

        return lax.fori_loop(0, pl.cdiv(size, CHUNK), move, carry)

    lax.fori_loop(jnp.int32(0), lax.div(work - first + (programs - 1), jnp.int32(programs)), one, ())
