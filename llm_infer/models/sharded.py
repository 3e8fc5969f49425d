"""How a model is cut over a mesh: which sizes are legal, and the order that the rows of its parameters need for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.sharding import Mesh, NamedSharding

from llm_infer.base.errors import UserError
from llm_infer.config import ParallelConfig
from llm_infer.models.config import ModelConfig, Shards
from llm_infer.models.params import Specs, split_model
from llm_infer.parallel.axes import OWN_NAMES, Axes, AxisNames
from llm_infer.parallel.mesh import GivenMesh, Where, make_mesh, nearest, too_large
from llm_infer.parallel.rules import num_parts, partition


def why_not(config: ModelConfig, parallel: ParallelConfig) -> str | None:
    """Says why the model cannot be cut so, or None. A KV head is never cut; if there are too few, devices hold copies."""
    tp, ep = parallel.tensor_parallel_size, parallel.expert_parallel_size
    heads, kv_heads, moe, cut = config.num_heads, config.num_kv_heads, config.moe, tp * ep
    if ep > 1 and moe is None:
        return f"expert_parallel_size={ep}, but {config.architecture} has no experts"
    if heads % cut or (kv_heads % cut and cut % kv_heads):
        return (
            f"{parallel} cuts the heads {cut} times: the {heads} query heads must divide by that, and it must divide "
            f"the {kv_heads} KV heads or be a multiple of them"
        )
    if config.recurrent and config.hidden_size % cut:
        return f"{parallel}: hidden_size={config.hidden_size}, the channels of convolutions, does not divide by {cut}"
    if moe is None and config.intermediate_size % cut:
        return f"{parallel}: intermediate_size={config.intermediate_size} does not divide by {cut}"
    if moe is not None and moe.num_experts % ep:
        return f"{parallel}: the {moe.num_experts} experts do not divide by {ep}"
    if moe is not None and moe.intermediate_size % tp:
        return f"{parallel}: the experts' intermediate_size={moe.intermediate_size} does not divide by {tp}"
    return None


@dataclass(frozen=True)
class Placement:
    """Puts the parameters of a model on the devices of a mesh.

    Attributes:
        config: of the cut model: where there are more devices than KV heads, `num_kv_heads` counts every copy.
        mesh: the devices.
    """

    config: ModelConfig
    mesh: Mesh

    @property
    def names(self) -> AxisNames:
        """How the mesh calls its axes."""
        return self.config.shards.names

    def axes(self, name: str) -> Axes:
        """Returns the logical axes of a parameter, as its module declares them."""
        return split_model(self.config)[1][name].axes

    def sharding(self, name: str, ndim: int) -> NamedSharding:
        """Returns where a parameter goes; a table in blocks has an axis in front of those that are declared."""
        axes = self.axes(name)
        return NamedSharding(self.mesh, partition(*(None,) * (ndim - len(axes)), *axes, names=self.names))

    def cuts(self, name: str) -> int:
        """Counts the parts into which the last axis of a matrix is cut: a row of blocks must hold whole blocks in each."""
        return num_parts(self.mesh, self.sharding(name, 3).spec, 3)[-1]

    def arrange(self, name: str, array: Any) -> Any:
        """Arranges the rows of a parameter, see `arrange`."""
        return arrange(array, self.axes(name), self.config)

    def __call__(self, name: str, array: np.ndarray | jax.Array) -> jax.Array:
        """Brings a whole parameter, or a stack of its blocks, to the devices, each its part."""
        arranged = np.asarray(self.arrange(name, array))
        sharding = self.sharding(name, arranged.ndim)
        return jax.make_array_from_callback(arranged.shape, sharding, lambda index: arranged[index])


def place_over(config: ModelConfig, parallel: Where, devices: Sequence[Any] | None = None) -> Placement | None:
    """Says how a model is cut over a mesh; None for one device that nobody chose, where nothing is cut.

    Args:
        config: of the whole model.
        parallel: sizes of the mesh, or a mesh that is there.
        devices: JAX's devices, or those of a topology that is only compiled for; all of this program when None.

    Raises:
        UserError: heads, MLP or experts do not divide, or there are too few devices; the message names the nearest
            sizes that work.
    """
    if isinstance(parallel, GivenMesh):
        if (problem := why_not(config, parallel.sizes)) is not None:
            raise UserError(f"{problem}: take a mesh of other sizes, or another role for one of its axes")
        return Placement(cut_config(config, parallel.sizes, parallel.names), parallel.mesh)
    running, devices = devices is None, jax.devices() if devices is None else devices

    def reason(sizes: ParallelConfig) -> str | None:
        return why_not(config, sizes) or too_large(sizes, len(devices))

    if (problem := reason(parallel)) is not None:
        fits = nearest(parallel, len(devices), lambda each: reason(each) is None)
        raise UserError(f"{problem}: set {fits.beside(parallel)}")
    used = {each.process_index for each in devices[: parallel.num_devices]} if running else set()
    if running and (idle := {each.process_index for each in devices} - used):
        raise UserError(
            f"{parallel} uses {parallel.num_devices} of {len(devices)} devices and none of process {min(idle)}: set sizes "
            f"whose product is {len(devices)}, or start fewer processes"
        )
    if parallel.num_devices == 1:
        return None
    return Placement(cut_config(config, parallel), make_mesh(parallel, devices))


def cut_config(config: ModelConfig, parallel: ParallelConfig, names: AxisNames = OWN_NAMES) -> ModelConfig:
    """Returns the configuration of a model that is cut over meshes of these sizes, with axes of these names."""
    tp, ep = parallel.tensor_parallel_size, parallel.expert_parallel_size
    copies = max(1, tp * ep // config.num_kv_heads)
    return replace(config, num_kv_heads=config.num_kv_heads * copies, shards=Shards(tp, ep, copies, names))


_ARRANGED = ("vocab", "qkv", "kv_heads", "expert_rows")
"""Axes whose rows `arrange` moves, repeats or fills up."""


def arrange(array: np.ndarray | jax.Array, axes: Axes, config: ModelConfig) -> np.ndarray | jax.Array:
    """Brings the rows of a parameter into the order in which a cut config needs them; numpy stays numpy.

    KV heads are repeated for every device that holds a copy, tables of the vocabulary filled up with zeros to equal
    parts, and of the experts' rows each device's share is brought together. `axes` are those that the parameter
    declares; an array in blocks may have more in front.
    """
    xp: Any = jnp if isinstance(array, jax.Array) else np
    shards, moe = config.shards, config.moe
    rows = next((name for name in _ARRANGED if name in axes), None)
    if rows is None:
        return array
    axis = array.ndim - len(axes) + axes.index(rows)
    if rows == "vocab":
        missing = shards.padded(config.vocab_size) - array.shape[axis]
        padding = [(0, missing if i == axis else 0) for i in range(array.ndim)]
        return xp.pad(array, padding) if missing else array
    by_row = xp.moveaxis(array, axis, 0)
    if rows == "expert_rows" and moe is not None and shards.tp > 1:
        sizes = {"ep": shards.ep, "tp": shards.tp, "x": moe.num_experts // shards.ep}
        return xp.moveaxis(rearrange(by_row, "(ep x tp f) ... -> (ep tp x f) ...", **sizes), 0, axis)
    if rows in ("qkv", "kv_heads") and shards.kv_copies > 1:
        copies, heads = shards.kv_copies, config.num_kv_heads // shards.kv_copies
        heads_first = rearrange(by_row, "(h r d) ... -> h r d ...", h=heads, d=config.head_dim)
        group = config.num_heads // heads if rows == "qkv" else 0
        queries, keys = xp.split(heads_first, [group], axis=1)
        keys = repeat(keys, "h r d ... -> h c r d ...", c=copies)
        # Each copy of a KV head serves its share of the head's queries.
        queries = rearrange(queries, "h (c g) d ... -> h c g d ...", c=copies)
        both = xp.concatenate([queries, keys], axis=2)
        return xp.moveaxis(rearrange(both, "h c r d ... -> (h c r d) ..."), 0, axis)
    return array


def restore(array: np.ndarray | jax.Array, axes: Axes, config: ModelConfig) -> np.ndarray | jax.Array:
    """Brings the rows of a parameter back into the order that they have in a model that is not cut: undoes `arrange`.

    Of copies of a KV head the first is taken. `array` may lack the axes of `axes` that come before its rows, such as layers.
    """
    xp: Any = jnp if isinstance(array, jax.Array) else np
    shards, moe = config.shards, config.moe
    rows = next((name for name in _ARRANGED if name in axes), None)
    if rows is None:
        return array
    axis = array.ndim - len(axes) + axes.index(rows)
    by_row = xp.moveaxis(array, axis, 0)
    if rows == "vocab":
        by_row = by_row[: config.vocab_size]
    elif rows == "expert_rows" and moe is not None and shards.tp > 1:
        sizes = {"ep": shards.ep, "tp": shards.tp, "x": moe.num_experts // shards.ep}
        by_row = rearrange(by_row, "(ep tp x f) ... -> (ep x tp f) ...", **sizes)
    elif rows in ("qkv", "kv_heads") and shards.kv_copies > 1:
        queries, keys = _copies(by_row, config, rows)
        queries = rearrange(queries, "h c g d ... -> h (c g) d ...")
        by_row = rearrange(xp.concatenate([queries, keys[:, 0]], axis=1), "h r d ... -> (h r d) ...")
    return xp.moveaxis(by_row, 0, axis)


def sum_copies(array: jax.Array, axes: Axes, config: ModelConfig) -> jax.Array:
    """Gives every copy of a KV head's rows the sum over all copies: what a gradient needs, so that they stay the same."""
    shards = config.shards
    rows = next((name for name in ("qkv", "kv_heads") if name in axes), None)
    if rows is None or shards.kv_copies == 1:
        return array
    axis = array.ndim - len(axes) + axes.index(rows)
    queries, keys = _copies(jnp.moveaxis(array, axis, 0), config, rows)
    keys = jnp.broadcast_to(jnp.sum(keys, axis=1, keepdims=True), keys.shape)
    both = jnp.concatenate([queries, keys], axis=2)
    return jnp.moveaxis(rearrange(both, "h c r d ... -> (h c r d) ..."), 0, axis)


def _copies(by_row: Any, config: ModelConfig, rows: str) -> tuple[Any, Any]:
    """Takes arranged rows apart: queries [h, c, g, D, …] of copy c of KV head h, none but in "qkv", and keys and values."""
    copies, heads = config.shards.kv_copies, config.num_kv_heads // config.shards.kv_copies
    found = rearrange(by_row, "(h c r d) ... -> h c r d ...", h=heads, c=copies, d=config.head_dim)
    group = config.num_heads // config.num_kv_heads if rows == "qkv" else 0
    return found[:, :, :group], found[:, :, group:]


def abstract_parameters(specs: Specs, placement: Placement) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes the parameters of a cut model with their shardings; `specs` are those of `split_model`."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=placement.sharding(name, len(spec.shape)))
        for name, spec in specs.items()
    }
