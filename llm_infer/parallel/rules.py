"""From logical axes to the cut of an array over a mesh."""

from __future__ import annotations

import math

from jax.sharding import Mesh, PartitionSpec

from llm_infer.parallel.axes import MESH_AXES


def partition(*axes: str | None) -> PartitionSpec:
    """Returns the cut of an array with these logical axes; None stands for a dimension that is never cut."""
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] or None for axis in axes))


def num_parts(mesh: Mesh, spec: PartitionSpec, ndim: int) -> tuple[int, ...]:
    """Counts the parts into which each dimension of an array is cut."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(math.prod(mesh.shape[axis] for axis in entry) for entry in entries) + (1,) * (ndim - len(entries))
