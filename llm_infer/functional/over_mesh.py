"""Runs a function of a model's parameters on every device of its mesh, each with its part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.dtypes import float0
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_infer.models.load import LoadedModel
from llm_infer.models.own import OwnDefinition, tree_names
from llm_infer.models.params import Params
from llm_infer.models.sharded import Placement, sum_copies
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
    params = _checked(model, params)
    if model.mesh is None:
        return run(params, arrays)
    placement = Placement(model.config, model.mesh)
    if model.config.shards.kv_copies > 1:
        params = {name: _one_gradient(placement, name, value) for name, value in params.items()}
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


def _one_gradient(placement: Placement, name: str, value: Any) -> Any:
    """Returns a parameter whose gradient is the same for all copies of a KV head: their sum."""

    @jax.custom_vjp
    def same(array: Any) -> Any:
        return array

    def backwards(_: None, change: Any) -> tuple[Any]:
        axes, config = placement.axes(name), placement.config
        return (jax.tree.map(lambda leaf: leaf if leaf.dtype == float0 else sum_copies(leaf, axes, config), change),)

    same.defvjp(lambda array: (array, None), backwards)
    return same(value)


def _checked(model: LoadedModel, params: Any) -> Params:
    """Returns parameters by name.

    Raises:
        ValueError: some are missing, unknown, or of other shapes than the model's.
    """
    if isinstance(model.definition, OwnDefinition) and (
        not isinstance(params, dict) or params.keys() != model.params.keys()
    ):
        names, leaves, _ = tree_names(params)
        params = dict(zip(names, leaves, strict=True))
    if missing := sorted(model.params.keys() - params.keys()):
        raise ValueError(f"params: {', '.join(missing[:5])} missing: expected {', '.join(model.params)}")
    if unknown := sorted(params.keys() - model.params.keys()):
        raise ValueError(f"params: the model has no {', '.join(unknown[:5])}: expected {', '.join(model.params)}")
    for name, value in params.items():
        expected = model.params[name]
        if _shape(value) != _shape(expected):
            raise ValueError(f"params: {name} has the shape {list(value.shape)}, expected {list(expected.shape)}")
    return params


def _shape(value: Any) -> tuple[int, ...]:
    """Returns a parameter's shape without the axis of length 1 that a single matrix has in blocks."""
    shape = tuple(value.shape)
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
