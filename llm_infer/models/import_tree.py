"""Gives the weights in a tree of another program, of Linen, NNX or plain dicts, Hugging Face's names by a table."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import EinopsError, rearrange
from jax import Array

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_layout import tensor_shapes
from llm_infer.models.new_weights import as_array
from llm_infer.models.registry import family

Transform = str | Callable[[Any], Any] | None
"""None; "T", which swaps the last two axes; an einops pattern; or a function of the array."""

Entry = str | tuple[str, Transform] | tuple[str, Transform, int]
"""Hugging Face's name; what is done with each array; and the axis along which an array is split, 0 where it is not said."""

Names = Mapping[str, Entry]
"""Dotted path in the tree → `Entry`; see `from_tree`."""

_PLACE = re.compile(r"\{([^{}]*)\}")
_VARIABLE = (".value", ".raw_value")
_SHOWN = 3


def from_tree(
    tree: Any, names: Names, config: ModelConfig, *, ignore: Sequence[str] = ()
) -> dict[str, Array | np.ndarray]:
    """Returns the arrays of a tree under Hugging Face's names, in the shapes that they have there; NumPy stays NumPy.

    `{i}` in a path of the table stands for a number, and in the name for the same one: `{"layers_{i}.q.kernel":
    ("model.layers.{i}.self_attn.q_proj.weight", "e h d -> (h d) e")}`. What is only in the name splits the array: `{i}`
    into as many as its axis is long, such as the layers that a scan has stacked, and `{k|v}` into those that are named.
    Several split one axis after the other. Each part is transformed on its own.

    Args:
        tree: nested mappings, lists and NNX states, or arrays by dotted names; `params` around it and `value` at the end of
            a path, which say nothing, are left out.
        names: the table, such as `tree_names.TUNIX_QWEN3`. It may name more than there is.
        config: of the model that is to take the weights.
        ignore: paths that are no weights, with `*` for any text.

    Raises:
        ModelError: a path is in no entry, or in several; a name is not of the model, or there twice; or shapes differ.
    """
    leaves = _leaves(tree)
    entries = [_Entry.read(path, entry) for path, entry in names.items()]
    ignored = re.compile("|".join(re.escape(each).replace(r"\*", ".*") for each in ignore) or r"(?!)")
    matches = {path: [each for each in entries if each.pattern.fullmatch(path)] for path in leaves}
    unused = [path for path, found in matches.items() if not found and not ignored.fullmatch(path)]
    if unused:
        raise ModelError(_unused(unused, list(names)))
    shapes = tensor_shapes(config)
    allowed = [re.compile(each) for each in family({"architectures": [config.architecture]}).IGNORED_TENSORS]
    arrays: dict[str, Array | np.ndarray] = {}
    for path, found in matches.items():
        if len(found) > 1:
            raise ModelError(f"{path} is in several entries: {', '.join(each.path for each in found)}")
        for name, array in found[0].tensors(path, leaves[path]) if found else ():
            if name in arrays:
                raise ModelError(f"{path} gives {name}, which is there already")
            if name not in shapes and not any(each.fullmatch(name) for each in allowed):
                near = ", ".join(difflib.get_close_matches(name, shapes, n=1, cutoff=0.0))
                raise ModelError(f"{path} gives {name}, which the model does not have; the nearest is {near}")
            if name in shapes and tuple(array.shape) != shapes[name]:
                raise ModelError(
                    f"{path} {list(leaves[path].shape)} gives {name} {list(array.shape)}, expected {list(shapes[name])}"
                )
            arrays[name] = array
    return arrays


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of a table, read.

    Attributes:
        path: as it is in the table.
        pattern: what it matches, a group for each place that has a number.
        name: Hugging Face's.
        transform: see `Transform`.
        axis: along which arrays are split first.
    """

    path: str
    pattern: re.Pattern[str]
    name: str
    transform: Transform
    axis: int

    @classmethod
    def read(cls, path: str, entry: Entry) -> _Entry:
        """Reads an entry as users write it."""
        name, transform, axis = _full(entry)
        texts = _PLACE.split(path)
        groups = [f"(?P<{part}>[0-9]+)" if odd % 2 else re.escape(part) for odd, part in enumerate(texts)]
        return cls(path, re.compile("".join(groups)), name, transform, axis)

    def tensors(self, path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
        """Yields names and arrays of a leaf."""
        found = self.pattern.fullmatch(path)
        assert found is not None
        known = found.groupdict()
        name = _PLACE.sub(lambda place: known.get(place[1], place[0]), self.name)
        for full, part in self._parts(path, name, leaf, self.axis):
            try:
                yield full, self._transformed(part)
            except (EinopsError, ValueError, TypeError) as error:
                raise ModelError(
                    f"{path} {list(part.shape)} cannot be transformed by {self.transform!r}: {str(error).strip()[:200]}"
                ) from None

    def _parts(self, path: str, name: str, array: Any, axis: int) -> Iterator[tuple[str, Any]]:
        """Splits an array along an axis for each place that is left in the name."""
        place = _PLACE.search(name)
        if place is None:
            yield name, array
            return
        if not -array.ndim <= axis < array.ndim:
            raise ModelError(f"{path} {list(array.shape)} has no axis {axis} along which {name} splits it")
        size = array.shape[axis]
        words = place[1].split("|") if "|" in place[1] else [str(number) for number in range(size)]
        if len(words) != size:
            raise ModelError(f"{path} {list(array.shape)}: axis {axis} has {size} parts for {place[0]}")
        front = (slice(None),) * (axis % array.ndim)
        for index, word in enumerate(words):
            yield from self._parts(path, name.replace(place[0], word), array[(*front, index)], 0)

    def _transformed(self, array: Any) -> Any:
        if self.transform is None:
            return array
        if callable(self.transform):
            return self.transform(array)
        return array.swapaxes(-1, -2) if self.transform == "T" else rearrange(array, self.transform)


def _full(entry: Entry) -> tuple[str, Transform, int]:
    """Returns an entry with all that it may leave out."""
    match entry:
        case str():
            return entry, None, 0
        case (name, transform):
            return name, transform, 0
        case _:
            return entry


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by dotted path."""
    found: dict[str, Any] = {}
    for path, leaf in _walk(tree, ""):
        name = next((path.removesuffix(end) for end in _VARIABLE if path.endswith(end)), path)
        if name in found:
            raise ModelError(f"{name} is there twice")
        found[name] = as_array(name, leaf)
    while found and all(name.startswith("params.") for name in found):
        found = {name.removeprefix("params."): leaf for name, leaf in found.items()}
    if not found:
        raise ModelError("there are no weights: expected a tree of arrays")
    return found


def _walk(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields paths and leaves."""
    tree = _unboxed(tree)
    if tree is None:
        return
    if not hasattr(tree, "items") and not isinstance(tree, list | tuple):
        yield path, tree
        return
    for key, value in enumerate(tree) if isinstance(tree, list | tuple) else tree.items():
        yield from _walk(value, f"{path}.{key}" if path else str(key))


def _unboxed(tree: Any) -> Any:
    """Returns the array of what holds one beside notes on it: a variable of NNX, or a partitioned parameter of Linen."""
    if callable(getattr(tree, "get_value", None)):
        return _unboxed(tree.get_value())
    plain = any(hasattr(tree, name) for name in ("shape", "items"))
    return tree if plain or not hasattr(tree, "value") else _unboxed(tree.value)


def _unused(paths: list[str], table: list[str]) -> str:
    """Says which paths no entry has, and what is near them."""
    shown = []
    for path in paths[:_SHOWN]:
        near = difflib.get_close_matches(re.sub(r"\d+", "{i}", path), table, n=1, cutoff=0.0)
        shown.append(path + (f" (the nearest entry is {near[0]})" if near else ""))
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"no entry of the table is for {', '.join(shown)}{more}: add entries, or name them in ignore"
