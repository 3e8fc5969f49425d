"""The device mesh: axes `dp` (shards of the batch), `tp` (parts of every layer) and `ep` (whole experts)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_infer.base.errors import UserError
from llm_infer.config import ParallelConfig
from llm_infer.parallel.axes import OWN_NAMES, ROLES, AxisNames
from llm_infer.parallel.rules import size_over

COMMON_NAMES = {
    **dict.fromkeys(("dp", "data", "batch", "replica", "fsdp"), "dp"),
    **dict.fromkeys(("tp", "tensor", "model"), "tp"),
    **dict.fromkeys(("ep", "expert", "experts"), "ep"),
}
"""Roles of axes by the names that people give them."""


@dataclass(frozen=True)
class GivenMesh:
    """A mesh that somebody else made, and how it calls its axes."""

    mesh: Mesh
    names: AxisNames

    @classmethod
    def of(cls, mesh: Mesh, axes: Mapping[str, str] | None = None) -> GivenMesh:
        """Says what each axis of a mesh is for.

        Args:
            mesh: devices with named axes.
            axes: name of an axis → "dp", "tp" or "ep"; for names that are not in it, COMMON_NAMES says so.

        Raises:
            UserError: an axis of more than one device has no role, or `axes` names others.
        """
        axes = dict(axes or {})
        if wrong := [f"{name!r}: {role!r}" for name, role in axes.items() if role not in ROLES]:
            raise UserError(f"axes: {{{', '.join(wrong)}}}: expected one of {', '.join(ROLES)} for each axis")
        if unknown := sorted(map(str, axes.keys() - set(mesh.axis_names))):
            raise UserError(f"axes: the mesh has no axis {', '.join(unknown)}: it has {', '.join(mesh.axis_names)}")
        roles = {name: axes.get(name, COMMON_NAMES.get(name)) for name in mesh.axis_names}
        if open_ := [name for name, role in roles.items() if role is None and mesh.shape[name] > 1]:
            raise UserError(
                f"the mesh's axis {open_[0]!r} has {mesh.shape[open_[0]]} devices: set axes={{{open_[0]!r}: …}} to 'dp' (shards "
                "of the batch), 'tp' (parts of every layer) or 'ep' (whole experts)"
            )
        by_role = {role: tuple(name for name, own in roles.items() if own == role) for role in ROLES}
        return cls(mesh, AxisNames(**by_role))

    @property
    def sizes(self) -> ParallelConfig:
        """How many devices there are of each role."""
        tp, dp, ep = (size_over(self.mesh, getattr(self.names, role)) for role in ("tp", "dp", "ep"))
        return ParallelConfig(tp, dp, ep)


Where = ParallelConfig | GivenMesh
"""Over which devices a model is cut: the first ones, in a mesh of these sizes, or those of a mesh that is there."""


def over_devices(parallel: ParallelConfig, devices: Sequence[Any]) -> GivenMesh:
    """Says that a model is to be cut over just these devices, be it one.

    Raises:
        UserError: there are none, one is there twice, or their number is not that of `parallel`.
    """
    if len(devices) == 0 or len(set(devices)) != len(devices):
        raise UserError(f"devices={[str(each) for each in devices]}: expected some of jax.devices(), each once")
    if parallel.num_devices != len(devices):
        raise UserError(
            f"{len(devices)} devices, but {parallel} needs {parallel.num_devices}: set sizes whose product is {len(devices)}, or "
            f"give {parallel.num_devices} devices"
        )
    return GivenMesh(make_mesh(parallel, devices), OWN_NAMES)


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any]) -> Mesh:
    """Returns the mesh [dp, tp, ep] of the first of these devices.

    Devices that differ only in `tp` and `ep` are neighbours in the list, so their sums stay on fast links.

    Raises:
        UserError: the mesh is larger than the devices.
    """
    if (reason := too_large(parallel, len(devices))) is not None:
        raise UserError(reason)
    shape = (parallel.data_parallel_size, parallel.tensor_parallel_size, parallel.expert_parallel_size)
    return Mesh(np.array(devices[: parallel.num_devices]).reshape(shape), ROLES)


def too_large(parallel: ParallelConfig, num_devices: int) -> str | None:
    """Says why a mesh of these sizes cannot be made of so many devices; None if it can."""
    if parallel.num_devices <= num_devices:
        return None
    return f"{parallel} needs {parallel.num_devices} devices, there are {num_devices}"


def nearest(parallel: ParallelConfig, num_devices: int, works: Callable[[ParallelConfig], bool]) -> ParallelConfig:
    """Returns the sizes closest to `parallel` that work, changing first `tp`, then `ep`, then `dp`; one device always works."""
    return next((each for each in _by_distance(parallel, num_devices) if works(each)), ParallelConfig())


def _by_distance(parallel: ParallelConfig, num_devices: int) -> Iterator[ParallelConfig]:
    def around(size: int) -> list[int]:
        return sorted(range(1, max(size, num_devices) + 1), key=lambda each: (abs(each - size), each))

    for dp in around(parallel.data_parallel_size):
        for ep in around(parallel.expert_parallel_size):
            for tp in around(parallel.tensor_parallel_size):
                yield replace(parallel, tensor_parallel_size=tp, data_parallel_size=dp, expert_parallel_size=ep)
