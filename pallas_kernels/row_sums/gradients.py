"""Gradients of row sums, the same for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.row_sums.xla import OF


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def differentiable(run: Callable[..., jax.Array], kind: str, x: jax.Array, shift: jax.Array) -> jax.Array:
    """Computes run(x, shift), the sums of this kind."""
    return run(x, shift)


@differentiable.defjvp
def _tangent(
    run: Callable[..., jax.Array], kind: str, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    (x, shift), (dx, dshift) = primals, tangents
    _, change = jax.jvp(OF[kind], (x - shift[:, None],), (dx - dshift[:, None],))
    return differentiable(run, kind, x, shift), jnp.sum(change, axis=-1)
