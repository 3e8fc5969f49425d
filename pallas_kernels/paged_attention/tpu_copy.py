"""copy_pages on TPU: one DMA from HBM to HBM per pair of pages, through all layers; all are in flight together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Case


def why_not(case: Case) -> str | None:
    """Refuses pools whose last two axes are the pages themselves; else any layout will do, as a DMA moves whole pages."""
    if len(case.shapes["pages"]) >= 4:
        return None
    return f"needs pages of at least 4 axes [L, P, …], found {list(case.shapes['pages'])}"


def copy_pages(
    pages: jax.Array, src: jax.Array, dst: jax.Array, count: jax.Array, *, interpret: Any = False
) -> jax.Array:
    """Copies on a TPU, see `pallas_kernels.paged_attention.copy_pages`; `interpret` is pallas_call's, for tests without a TPU."""
    hbm, smem = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        in_specs=[smem, smem, smem, hbm],
        out_specs=hbm,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        input_output_aliases={3: 0},
        interpret=interpret,
        name="copy_pages",
    )(count[None], src, dst, pages)


def _kernel(count: Any, src: Any, dst: Any, pages_in: Any, pages: Any, semaphore: Any) -> None:
    del pages_in  # the same memory

    def copy(pair: jax.Array) -> Any:
        return pltpu.make_async_copy(pages.at[:, src[pair]], pages.at[:, dst[pair]], semaphore)

    def start(pair: jax.Array, carry: None) -> None:
        copy(pair).start()
        return carry

    def wait(pair: jax.Array, carry: None) -> None:
        copy(pair).wait()
        return carry

    lax.fori_loop(jnp.int32(0), count[0], start, None)
    lax.fori_loop(jnp.int32(0), count[0], wait, None)
