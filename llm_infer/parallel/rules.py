"""From logical axes to the cut of an array over a mesh."""

from __future__ import annotations

import math

from jax.sharding import Mesh, PartitionSpec

from llm_infer.parallel.axes import MESH_AXES, OWN_NAMES, AxisNames


def partition(*axes: str | None, names: AxisNames = OWN_NAMES) -> PartitionSpec:
    """Returns the cut of an array with these logical axes over a mesh with these names; None is a dimension never cut."""
    return PartitionSpec(*(None if axis is None else names.of(MESH_AXES[axis]) or None for axis in axes))


def size_over(mesh: Mesh, names: tuple[str, ...]) -> int:
    """Counts the parts into which these axes of a mesh cut."""
    return math.prod(mesh.shape[name] for name in names)


def num_parts(mesh: Mesh, spec: PartitionSpec, ndim: int) -> tuple[int, ...]:
    """Counts the parts into which each dimension of an array is cut."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(math.prod(mesh.shape[axis] for axis in entry) for entry in entries) + (1,) * (ndim - len(entries))
