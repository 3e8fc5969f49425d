"""The device mesh: axes `dp` (shards of the batch), `tp` (parts of every layer) and `ep` (whole experts)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_infer.base.errors import UserError
from llm_infer.config import ParallelConfig

AXES = ("dp", "tp", "ep")


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any]) -> Mesh:
    """Returns the mesh [dp, tp, ep] of the first of these devices.

    Devices that differ only in `tp` and `ep` are neighbours in the list, so their sums stay on fast links.

    Raises:
        UserError: the mesh is larger than the devices.
    """
    if (reason := too_large(parallel, len(devices))) is not None:
        raise UserError(reason)
    shape = (parallel.data_parallel_size, parallel.tensor_parallel_size, parallel.expert_parallel_size)
    return Mesh(np.array(devices[: parallel.num_devices]).reshape(shape), AXES)


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
