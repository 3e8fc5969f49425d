"""Undoes rules: makes a file's tensors again of the parameters that were made of them.

An arrangement of `Rule` moves whole rows and may add one number to all of them. So it is undone without being known: it
is asked once where each row goes, and what it makes of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llm_infer.weights.rules import HasShape, Make, Rule, names_by_layer


@dataclass(frozen=True, slots=True)
class Undo:
    """Tensors of a file, and how they are made of parameters.

    Attributes:
        params: the parameters.
        tensors: names of the tensors; with `{layer}` in them, the parameters are stacked and `make` is given one layer's.
        make: makes the tensors, in order, of the parameters, in order. It must work for every type.
        layers: see `Rule`.
        adds: whether a number was added to what the file holds.
    """

    params: tuple[str, ...]
    tensors: tuple[str, ...]
    make: Make
    layers: Sequence[int] | None = None
    adds: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the parameters have a leading axis of layers."""
        return "{layer}" in self.tensors[0]

    def groups(self, num_layers: int) -> list[tuple[str, ...]]:
        """Returns the names of the tensors, one tuple per layer; see `names_by_layer`."""
        return names_by_layer(self.tensors, num_layers, self.layers)

    def shapes(self, specs: Mapping[str, HasShape]) -> list[tuple[int, ...]]:
        """Returns the shape of each tensor of a layer."""
        shapes = [tuple(specs[name].shape[1:] if self.stacked else specs[name].shape) for name in self.params]
        # One byte seen from every index, as the loader does it.
        return [each.shape for each in self.make([np.broadcast_to(np.uint8(0), shape) for shape in shapes])]


def undo(rules: Sequence[Rule], specs: Mapping[str, HasShape], rows: Callable[[str], int | None]) -> list[Undo]:
    """Says how the tensors of some rules are made again; rules of parameters without a spec are left out.

    Rules with the same sources are undone together: each has a part of the rows.

    Args:
        rules: those of a model.
        specs: parameter name → shape.
        rows: number of rows of a tensor, by its name in a rule; None for those that share the rows equally with the
            others of their rule.

    Raises:
        ValueError: rules are not undone by moving rows, or some rows are in none of their parameters.
    """
    together: dict[tuple[str, ...], list[Rule]] = {}
    for rule in rules:
        if rule.param in specs:
            together.setdefault(rule.sources, []).append(rule)
    return [_undo(group, specs, rows) for group in together.values()]


def _undo(rules: list[Rule], specs: Mapping[str, HasShape], rows: Callable[[str], int | None]) -> Undo:
    first = rules[0]
    params = tuple(rule.param for rule in rules)
    if len(rules) == 1 and (first.back is not None or first.arrange is None):
        return Undo(params, first.sources, first.back or list, first.layers)
    total = sum(specs[name].shape[1 if first.stacked else 0] for name in params)
    known = [rows(source) for source in first.sources] if len(first.sources) > 1 else [total]
    sizes = [total // len(known) if each is None else each for each in known]
    if sum(sizes) != total:
        raise ValueError(f"{', '.join(first.sources)}: {sizes} rows for {total} of {', '.join(params)}")
    bounds = np.cumsum([0, *sizes])
    places, added = [], []
    for rule in rules:
        assert rule.arrange is not None
        zeros = rule.arrange([np.zeros(size, np.int64) for size in sizes])
        added.append(int(zeros[0]))
        places.append(rule.arrange([np.arange(a, b) for a, b in pairwise(bounds)]) - zeros)
    if not np.array_equal(np.sort(np.concatenate(places)), np.arange(total)):
        raise ValueError(f"{', '.join(first.sources)}: not every row is in one place of {', '.join(params)}")

    def make(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        whole = _placed(arrays, places, added)
        return [whole[a:b] for a, b in pairwise(bounds)]

    return Undo(params, first.sources, make, first.layers, any(added))


def _placed(arrays: Sequence[np.ndarray], places: Sequence[np.ndarray], added: Sequence[int]) -> np.ndarray:
    """Brings the rows of some arrays to their places in one, less what was added."""
    less = [array - number if number else array for array, number in zip(arrays, added, strict=True)]
    if len(less) == 1 and np.array_equal(places[0], np.arange(len(places[0]))):
        return less[0]
    whole = np.empty((sum(map(len, places)), *less[0].shape[1:]), less[0].dtype)
    for array, place in zip(less, places, strict=True):
        whole[place] = array
    return whole
