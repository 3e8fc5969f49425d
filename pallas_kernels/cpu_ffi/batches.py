"""How a native call whose rows are independent takes the axis that `jax.vmap` adds: as more rows of one call.

Calls that are not wrapped are made one after the other (`bridge.Kernel`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def as_rows(call: Callable[..., jax.Array], count: int) -> Callable[..., jax.Array]:
    """Returns `call`, which under `jax.vmap` computes all rows of a batch in one call.

    Where another argument has the batch's axis too, there is a call for each of its members.

    Args:
        call: a function of arrays, the first `count` of shape [R, ...]. Row r of the result [R, ...] depends on their rows r and
            on the other arguments alone.
        count: how many arguments have rows.
    """

    @custom_vmap
    def batchable(*arguments: jax.Array) -> jax.Array:
        return call(*arguments)

    @batchable.def_vmap
    def _batched(size: int, batched: list[bool], *arguments: jax.Array) -> tuple[jax.Array, bool]:
        if any(batched[count:]):
            return jax.vmap(call, [0 if here else None for here in batched])(*arguments), True
        every = [
            each if here else jnp.broadcast_to(each, (size, *each.shape))
            for each, here in zip(arguments[:count], batched[:count], strict=True)
        ]
        out = batchable(*(each.reshape(-1, *each.shape[2:]) for each in every), *arguments[count:])
        return out.reshape(size, -1, *out.shape[1:]), True

    return batchable
