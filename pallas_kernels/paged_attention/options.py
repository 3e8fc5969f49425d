"""What a call of paged attention is told beside its arrays: one list for the entry point and every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class AttentionOptions(NamedTuple):
    """The keyword arguments of `pallas_kernels.paged_attention.paged_attention`, which says what each means."""

    layer: jax.Array | int
    scale: float
    window: jax.Array | int | None = None
    softcap: float | None = None
    sinks: jax.Array | None = None
    k_scale: jax.Array | float | None = None
    v_scale: jax.Array | float | None = None


def by_keyword(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an implementation as it is called to be checked or measured alone: with its options as keyword arguments."""

    def call(*arrays: Any, **given: Any) -> Any:
        options = {name: given.pop(name) for name in AttentionOptions._fields if name in given}
        return implementation(*arrays, options=AttentionOptions(**options), **given)

    return call
