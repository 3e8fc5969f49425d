"""Reads the weights in an Orbax checkpoint that another program wrote, such as a trainer, under their dotted names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.base.files import typed_path
from llm_infer.weights.orbax_tree import OrbaxTree, is_tree

if TYPE_CHECKING:
    import jax

_ITEMS = ("default", "params", "model_params", "model", "state")
"""Names of a step's items, the most telling first, of which one is taken where there are several."""
_PARAMS = "params."


def read_orbax(path: str | os.PathLike[str], *, like: Mapping[str, Any] | None = None) -> dict[str, jax.Array]:
    """Reads the arrays of any Orbax checkpoint of a tree, as `update_weights` takes them.

    Of a training state, whose tree has `params` beside other things, those are read, and their names begin below it. Numbers
    and texts are left out.

    Args:
        path: what `StandardCheckpointer` or `PyTreeCheckpointer` wrote; a step of a `CheckpointManager` or one of its items; or
            the manager's directory, of which the newest step is read.
        like: arrays or `jax.ShapeDtypeStruct`s by name, in nested mappings or not. Only these are read, with their types,
            and their shardings where shapes are equal. Rows stay in the order in which they were written.

    Returns:
        Arrays by dotted name, `value` or `raw_value` at the end left out.

    Raises:
        ModelError: there is no such checkpoint, it is damaged, or it lacks names of `like`.
    """
    folder = typed_path(path)
    tree = OrbaxTree(_tree_folder(folder))
    inner = dict(_below_params(list(tree.leaves)))
    if not inner:
        raise ModelError(f"{folder} holds no arrays")
    if like is None:
        return {inner[name]: array for name, array in tree.restore(list(inner))}
    wanted = dict(_flat(like))
    by_name = {short: name for name, short in inner.items()}
    if absent := [name for name in wanted if name not in by_name]:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise ModelError(f"{folder} has no {', '.join(absent[:5])}{more}: it has {', '.join(list(by_name)[:5])} …")
    names = {by_name[name]: each for name, each in wanted.items()}
    dtypes = {name: np.dtype(each.dtype) for name, each in names.items() if hasattr(each, "dtype")}
    shardings = {
        name: each.sharding
        for name, each in names.items()
        if getattr(each, "sharding", None) is not None and tuple(each.shape) == tree.leaves[name].shape
    }
    restored = tree.restore(list(names), shardings=shardings, dtypes=dtypes)
    return {inner[name]: array for name, array in restored}


def _tree_folder(folder: Path) -> Path:
    """Returns the folder of the tree that a checkpoint is, or that its step or its manager has.

    Raises:
        ModelError: there is none, or several that might be meant.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no directory: expected an Orbax checkpoint")
    if is_tree(folder):
        return folder
    # A directory whose name says so is what an interrupted save left.
    below = [each for each in sorted(folder.iterdir()) if each.is_dir() and "orbax-checkpoint-tmp" not in each.name]
    items = {each.name: each for each in below if is_tree(each)}
    if len(items) == 1:
        return next(iter(items.values()))
    if items:
        if (name := next((name for name in _ITEMS if name in items), None)) is not None:
            return items[name]
        raise ModelError(f"{folder} has several trees: give one of {', '.join(items)}")
    steps = [(int(found[0]), each) for each in below if (found := re.findall(r"\d+$", each.name))]
    for _, step in sorted(steps, reverse=True):
        if any(is_tree(each) for each in step.iterdir() if each.is_dir()) or is_tree(step):
            return _tree_folder(step)
    raise ModelError(f"{folder} is no Orbax checkpoint: neither it nor what is in it describes a tree of arrays")


def _below_params(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yields the names of weights, in full and below `params`, which may be there once, twice or not at all."""
    shorter = {name: name for name in names}
    while any(short.startswith(_PARAMS) for short in shorter.values()):
        shorter = {n: short.removeprefix(_PARAMS) for n, short in shorter.items() if short.startswith(_PARAMS)}
    yield from shorter.items()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings with their dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
