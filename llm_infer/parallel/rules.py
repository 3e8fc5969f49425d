"""One table from logical axes to mesh axes, and from parameter names to logical axes: how everything is cut."""

from __future__ import annotations

import math

from jax.sharding import Mesh, PartitionSpec

MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("dp",),  # shards of the step's buffer, of last ids and of per-slot state
    "pages": ("dp",),  # page ids are local to a shard
    "heads": ("tp", "ep"),  # of queries, keys and values, and so the K and V in the pages
    "mlp": ("tp", "ep"),
    "vocab": ("tp", "ep"),
    "experts": ("ep",),
    "expert_mlp": ("tp",),
    "expert_rows": ("ep", "tp"),  # rows of all experts of a layer: F rows each, see `models.sharded.arrange`
}
"""Logical axis → mesh axes over which it is cut, the outermost first. An axis that is not here is not cut."""

_WHOLE = (None, None)
_MATRICES: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("embed", "head"), ("vocab", None)),
    **dict.fromkeys(("qkv", "q", "k", "v"), ("heads", None)),
    "o": (None, "heads"),
    **dict.fromkeys(("gate", "up"), ("mlp", None)),
    "down": (None, "mlp"),
    **dict.fromkeys(("attn_norm", "mlp_norm", "final_norm", "q_norm", "k_norm"), _WHOLE),
    **dict.fromkeys(("router", "positions", "project_in", "project_out"), _WHOLE),
}
_EXPERTS: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("gate", "up"), ("expert_rows", None)),
    "down": ("experts", "expert_mlp"),
}


def logical_axes(name: str, ndim: int, *, moe: bool) -> tuple[str | None, ...]:
    """Logical axis of each dimension of a parameter.

    Args:
        name: dotted name, e.g. `layers.attn.qkv.weight`.
        ndim: its dimensions: [V, E], [L, out, in], [L, out] of a bias or norm …; a matrix in blocks has three.
        moe: the model is a mixture of experts.

    Raises:
        ValueError: the table has no such parameter.
    """
    module, kind = name.split(".")[-2:]
    table = _MATRICES | _EXPERTS if moe else _MATRICES
    if module not in table or kind not in ("weight", "bias"):
        raise ValueError(f"{name}: parallel.rules has no row for {module!r}; add how it is cut over the mesh")
    axes = table[module][:1] if kind == "bias" else table[module]
    if axes == _WHOLE or ndim < len(axes):
        return (None,) * ndim
    return (None,) * (ndim - len(axes)) + axes


def partition(*axes: str | None) -> PartitionSpec:
    """The cut of an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in axes))


def num_parts(mesh: Mesh, spec: PartitionSpec, ndim: int) -> tuple[int, ...]:
    """Into how many parts each dimension of an array is cut."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(math.prod(mesh.shape[axis] for axis in entry) for entry in entries) + (1,) * (ndim - len(entries))


def parameter_partition(name: str, ndim: int, *, moe: bool) -> PartitionSpec:
    """The cut of a parameter; arguments as for `logical_axes`."""
    return partition(*logical_axes(name, ndim, moe=moe))
