"""Shared by the ops' entry points: refuses an argument by its name, and describes a call to `dispatch`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.numerics import is_invariant


def expect(holds: bool, name: str, expected: str, found: jax.Array) -> None:
    """Raises a ValueError that names the argument, what is allowed and what was found, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {found.dtype.name} of shape {list(found.shape)}")


def layer_index(layer: jax.Array | int, num_layers: int) -> jax.Array:
    """Returns a layer's number as an int32 scalar; a number known while tracing must be 0 … num_layers - 1.

    Raises:
        ValueError: the array is no integer scalar, or the number lies outside.
    """
    if isinstance(layer, jax.Array | np.ndarray):
        expect(layer.ndim == 0 and jnp.issubdtype(layer.dtype, jnp.integer), "layer", "a scalar integer", layer)
        return jnp.asarray(layer, jnp.int32)
    try:
        number = operator.index(layer)
    except TypeError:
        raise ValueError(f"layer: expected an integer, found {layer!r}") from None
    if not 0 <= number < num_layers:
        raise ValueError(f"layer: expected 0 … {num_layers - 1}, found {number}")
    return jnp.asarray(number, jnp.int32)


def case_of(arrays: Mapping[str, jax.Array | jax.ShapeDtypeStruct], **options: Any) -> dispatch.Case:
    """Returns the case of a call with these array arguments and static settings, on the device for which code is traced."""
    platform, device_kind = dispatch.target()
    if is_invariant():
        options["invariant"] = True
    return dispatch.Case(
        platform=platform,
        device_kind=device_kind,
        shapes={name: tuple(array.shape) for name, array in arrays.items()},
        dtypes={name: array.dtype.name for name, array in arrays.items()},
        options=options,
    )
