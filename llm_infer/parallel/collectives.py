"""Communication between devices of a mesh inside a step; over no axes, nothing is emitted."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

MeshAxes = tuple[str, ...]
"""Names of mesh axes of more than one device, the outermost first."""


def sum_over(x: Array, axes: MeshAxes) -> Array:
    """Returns the sum of every device's `x`: one all-reduce."""
    return lax.psum(x, axes) if axes else x


def gather_columns(x: Array, axes: MeshAxes) -> Array:
    """Returns every device's columns [S, V / n] side by side, [S, V]: one all-gather."""
    return lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def gather_rows(x: Array, axes: MeshAxes) -> Array:
    """Returns every device's rows [B, …], one below the other: one all-gather."""
    return lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def first_of_part(size: int, axes: MeshAxes) -> Array:
    """Returns the index of the first of the `size` elements that this device has of an axis cut over `axes`."""
    return lax.axis_index(axes) * size if axes else jnp.int32(0)
