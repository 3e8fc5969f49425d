"""Gradients and batches of grouped matmul, the same for every implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.custom_batching import sequential_vmap

from pallas_kernels.grouped_matmul.ragged import grouped_matmul


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(
    run: Callable[..., jax.Array], x: jax.Array, weights: jax.Array, group_sizes: jax.Array, layer: jax.Array
) -> jax.Array:
    """Computes run(x, weights, group_sizes, layer), the calls of a batch one after the other: groups lie in rows of x."""
    return sequential_vmap(run)(x, weights, group_sizes, layer)


def _forward(run: Callable[..., jax.Array], *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return differentiable(run, *arguments), arguments


def _backward(
    run: Callable[..., jax.Array], saved: tuple[jax.Array, ...], change: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    del run

    @sequential_vmap
    def pull_back(
        change: jax.Array, x: jax.Array, weights: jax.Array, group_sizes: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, ...]:
        product = partial(grouped_matmul, group_sizes=group_sizes, layer=layer)
        return jax.vjp(product, x, weights)[1](change)

    to_x, to_weights = pull_back(change.astype(saved[0].dtype), *saved)
    return to_x, to_weights, None, None


differentiable.defvjp(_forward, _backward)
