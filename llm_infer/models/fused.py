"""Puts query, key and value projections together into one matrix, as `qkv_rules` does while loading, and takes them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.params import Params
from llm_infer.quant import StoredWeights

_FUSED, _APART = "layers.attn.qkv.", "layers.attn."


def fuse(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """Returns a model's parameters with q, k and v in one, rows grouped per KV head [q…q|k|v], and its configuration.

    Nothing changes where they are fused already. The other parameters are taken by reference.

    Args:
        params: by name, of JAX or NumPy, or matrices in blocks.
        config: of the model, which may be cut over a mesh.

    Raises:
        ModelError: a projection is missing, or the three are in blocks that do not go together.
    """
    if config.fused_qkv:
        return params, config

    def together(arrays: Sequence[Any]) -> list[Any]:
        by_head = [rearrange(each, "l (h r) ... -> l h r ...", h=config.num_kv_heads) for each in arrays]
        xp: Any = jnp if any(isinstance(each, jax.Array) for each in arrays) else np
        return [rearrange(xp.concatenate(by_head, axis=2), "l h r ... -> l (h r) ...")]

    changed = {}
    for part in ("weight", "bias") if config.qkv_bias else ("weight",):
        apart = _taken(params, [f"{_APART}{name}.{part}" for name in "qkv"])
        changed[f"{_FUSED}{part}"] = _moved(apart, together)[0]
    return _without(params, [f"{_APART}{name}." for name in "qkv"], changed), replace(config, fused_qkv=True)


def unfuse(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """Returns a model's parameters with q, k and v each alone, and its configuration: undoes `fuse`.

    Nothing changes where they are apart already.

    Raises:
        ModelError: the fused matrix is missing, or in blocks whose rows cannot be moved.
    """
    if not config.fused_qkv:
        return params, config
    group = config.num_heads // config.num_kv_heads

    def apart(arrays: Sequence[Any]) -> list[Any]:
        by_head = rearrange(arrays[0], "l (h r d) ... -> l h r d ...", h=config.num_kv_heads, d=config.head_dim)
        parts = (by_head[:, :, :group], by_head[:, :, group : group + 1], by_head[:, :, group + 1 :])
        return [rearrange(each, "l h r d ... -> l (h r d) ...") for each in parts]

    changed = {}
    for part in ("weight", "bias") if config.qkv_bias else ("weight",):
        found = _moved(_taken(params, [f"{_FUSED}{part}"]), apart)
        changed |= {f"{_APART}{name}.{part}": each for name, each in zip("qkv", found, strict=True)}
    return _without(params, [_FUSED], changed), replace(config, fused_qkv=False)


def _taken(params: Params, names: Sequence[str]) -> list[Any]:
    """Returns some parameters."""
    if absent := [name for name in names if name not in params]:
        raise ModelError(f"the model has no parameter {', '.join(absent)}")
    return [params[name] for name in names]


def _moved(values: Sequence[Any], move: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """Moves whole rows of arrays [L, N, …], or of blocks."""
    if not isinstance(values[0], StoredWeights):
        return move(values)
    first = values[0]
    for each in values:
        if not isinstance(each, StoredWeights) or (each.kinds, each.places) != (first.kinds, first.places):
            raise ModelError("query, key and value projections are in blocks of different kinds: they stay apart")
        if any(each.tiled):
            raise ModelError("query, key and value projections are in tiled blocks, whose rows do not move alone")
    moved = [move(stacks) for stacks in zip(*(each.blocks for each in values), strict=True)]
    return [replace(first, blocks=tuple(stacks)) for stacks in zip(*moved, strict=True)]


def _without(params: Params, prefixes: Sequence[str], changed: Params) -> Params:
    """Returns the parameters with some in the place of those that begin so."""
    first = next(name for name in params if name.startswith(tuple(prefixes)))
    found: Params = {}
    for name, value in params.items():
        if name == first:
            found |= changed
        if not name.startswith(tuple(prefixes)):
            found[name] = value
    return found
