"""Runs a function of a model's parameters on every device of its mesh, each with its part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_infer.models.load import LoadedModel
from llm_infer.models.params import Params
from llm_infer.models.sharded import Placement
from llm_infer.parallel.rules import partition


def over_mesh(model: LoadedModel, run: Callable[..., Any], params: Params, arrays: Any, cuts: Any, results: Any) -> Any:
    """Returns `run(params, arrays)`; on a mesh every device computes its part.

    Args:
        model: says what is cut over which axes.
        run: computes one device's part.
        params: the whole parameters.
        arrays: what else `run` takes, a pytree.
        cuts: how `arrays` are cut: a `PartitionSpec` for each, or for whole branches.
        results: how what `run` returns is cut.
    """
    if model.mesh is None:
        return run(params, arrays)
    placement = Placement(model.config, model.mesh)
    own = {
        name: jax.tree.map(lambda leaf, name=name: placement.sharding(name, leaf.ndim).spec, value)
        for name, value in params.items()
    }
    if AxisType.Explicit in model.mesh.axis_types:  # then shard_map takes nothing that is cut otherwise

        def cut(spec: PartitionSpec, branch: Any) -> Any:
            sharding = NamedSharding(placement.mesh, spec)
            return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, sharding), branch)

        arrays = jax.tree.map(cut, cuts, arrays, is_leaf=lambda each: isinstance(each, PartitionSpec))
    each = jax.shard_map(run, mesh=model.mesh, in_specs=(own, cuts), out_specs=results, check_vma=False)
    return each(params, arrays)


def of_batch(model: LoadedModel, rows: int) -> PartitionSpec:
    """Returns how an array of so many rows is cut: over the shards of the batch, where they divide it."""
    if model.mesh is None or rows % model.num_shards:
        return PartitionSpec()
    return partition("batch", names=model.config.shards.names)
