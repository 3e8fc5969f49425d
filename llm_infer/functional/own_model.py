"""Registers a model that a user has written in JAX, so that an engine serves it: paged, batched, and cut over a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_infer.base.errors import UserError
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel
from llm_infer.models.own import Forward, Logits, OwnFamily, tree_names
from llm_infer.models.params import split_model
from llm_infer.models.registry import FAMILIES
from llm_infer.models.sharded import place_over
from llm_infer.parallel.axes import MESH_AXES, Axes, ParamSpec
from llm_infer.parallel.mesh import GivenMesh
from llm_infer.text.tokenizer import Tokenizer


def register_model(
    config: ModelConfig,
    forward: Forward,
    logits: Logits,
    params: Any,
    *,
    mesh: Mesh | None = None,
    axes: Mapping[str, str] | None = None,
    cuts: Mapping[str, Axes] | None = None,
    tokenizer: Tokenizer | None = None,
) -> LoadedModel:
    """Makes a model of functions, for `LLM.from_model` and the functions of this package.

    `forward(params, config, token_ids, positions, cache, attend) -> (hidden, cache)` computes T tokens of any sequences.
    In each layer it calls `out, cache = attend(query, key, value, cache, layer, scale=…)` with queries [T, Hq, D], keys
    and values [T, Hkv, D] and the number of the layer, and never looks at other tokens otherwise; `window`, `softcap` and
    `sinks` may be given too. `logits(params, config, hidden) -> [S, V]` in float32 computes some tokens' scores.

    Args:
        config: what the engine must know: `ModelConfig(architecture, vocab_size, hidden_size, num_layers, num_heads,
            num_kv_heads, head_dim, intermediate_size, max_position_embeddings)`; `windows` where layers have some. The
            architecture is a name of the user's.
        forward, logits: pure functions.
        params: a tree of arrays: dictionaries, lists, tuples.
        mesh, axes: as of `load_model`. Both functions then run on each device with its part of the parameters, and
            `config.shards.axes` names the mesh axes over which they are to sum.
        cuts: dotted name of a parameter → logical axis of each of its dimensions, of `parallel.axes.MESH_AXES`, such as
            ("layers", "heads", "embed"); parameters that are not there are whole on every device.
        tokenizer: of the model; without one it takes token ids.

    Raises:
        UserError: the architecture is a built-in one, a cut does not fit, or the model cannot be cut so.
    """
    if config.architecture in FAMILIES:
        raise UserError(f"architecture {config.architecture!r} is built in: choose another name")
    names, leaves, structure = tree_names(params)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"params: two parameters have the name {twice[0]}: rename one")
    leaves = [_array(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    cuts = dict(cuts or {})
    if unknown := sorted(cuts.keys() - set(names)):
        raise UserError(f"cuts: there is no parameter {', '.join(unknown)}: there are {', '.join(names)}")
    specs = {}
    for name, leaf in zip(names, leaves, strict=True):
        own = cuts.get(name, ("embed",) * jnp.ndim(leaf))
        try:
            specs[name] = ParamSpec(jnp.shape(leaf), jnp.dtype(leaf.dtype), tuple(own))
        except ValueError as error:
            known = ", ".join(MESH_AXES)
            raise UserError(f"cuts: {name} {list(jnp.shape(leaf))}: {error}; axes are {known}") from None
    config = replace(config, own=OwnFamily(forward, logits, tuple(names), structure, specs))
    placement = None if mesh is None else place_over(config, GivenMesh.of(mesh, axes))
    placed = {
        name: jnp.asarray(leaf) if placement is None else jax.device_put(leaf, placement.sharding(name, jnp.ndim(leaf)))
        for name, leaf in zip(names, leaves, strict=True)
    }
    whole = config if placement is None else placement.config
    dtype = next((leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)), jnp.dtype(jnp.float32))
    return LoadedModel(whole, split_model(whole, dtype)[0], placed, jnp.dtype(dtype), mesh, tokenizer)


def _array(name: str, leaf: Any) -> jax.Array:
    """Returns a parameter as JAX has it.

    Raises:
        UserError: it is no array of numbers.
    """
    try:
        array = jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise UserError(f"params: {name} is {type(leaf).__name__}, expected an array: {str(error)[:100]}") from None
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise UserError(f"params: {name} has the type {array.dtype}, expected numbers")
    return array
