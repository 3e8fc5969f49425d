"""Logical axes of arrays, the mesh axes over which each is cut, and what a parameter declares of itself. No JAX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

MESH_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("dp",),  # shards of the step's buffer, of last ids and of per-slot state
    "pages": ("dp",),  # page ids are local to a shard
    "vocab": ("tp", "ep"),
    "heads": ("tp", "ep"),  # of queries, D rows or columns each
    "kv_heads": ("tp", "ep"),  # of keys or values, and so the K and V in the pages
    "qkv": ("tp", "ep"),  # fused rows, grouped per KV head [q…q|k|v]
    "mlp": ("tp", "ep"),
    "channels": ("tp", "ep"),  # of short convolutions
    "experts": ("ep",),  # E rows of each expert
    "expert_mlp": ("tp",),
    "expert_rows": ("ep", "tp"),  # F rows of each expert of a layer, see `models.sharded.arrange`
    # Not cut:
    "layers": (),
    "embed": (),
    "head_dim": (),
    "router": (),
    "positions": (),
    "narrow": (),
    "taps": (),
}
"""Logical axis → mesh axes over which it is cut, the outermost first; a mesh may call these otherwise (`AxisNames`)."""

ROLES = ("dp", "tp", "ep")
"""What an axis of a mesh may be for: shards of the batch, parts of every layer, whole experts."""


@dataclass(frozen=True, slots=True)
class AxisNames:
    """How a mesh calls its axes: the names of those that have each role, the outermost first; none where it has no such axis."""

    dp: tuple[str, ...] = ("dp",)
    tp: tuple[str, ...] = ("tp",)
    ep: tuple[str, ...] = ("ep",)

    def of(self, roles: Iterable[str]) -> tuple[str, ...]:
        """Returns the names of all axes with these roles."""
        return tuple(name for role in roles for name in getattr(self, role))


OWN_NAMES = AxisNames()
"""The names in meshes that are made here."""

Axes = tuple[str, ...]
"""The logical axis of each dimension of an array."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What a module declares of one parameter: everything else (cuts, counts, random values) follows from it.

    Attributes:
        shape, dtype: of the whole array.
        axes: logical axis of each dimension, names of `MESH_AXES`.
        mean, std: of the normal distribution from which random weights are drawn.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    mean: float = 0.0
    std: float = 0.0

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or any(axis not in MESH_AXES for axis in self.axes):
            raise ValueError(
                f"axes={self.axes} for {self.shape}: expected one name of parallel.axes.MESH_AXES per dimension"
            )

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def size_on_device(self, mesh: Mapping[str, int]) -> int:
        """Counts the weights of one device's part; `mesh` has the size of each mesh axis."""
        return self.size // math.prod(mesh.get(each, 1) for axis in self.axes for each in MESH_AXES[axis])
