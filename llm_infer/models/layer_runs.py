"""Layers of several kinds: which of them a loop over layers computes in turn, and their places in the stacks of their kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from llm_infer.models.config import ModelConfig
from llm_infer.models.layers import Layer

LONGEST_PERIOD = 16
"""Layers after which a pattern is sought again; published ones end at 6."""


class LayerKind(NamedTuple):
    """What tells layers apart that the same program cannot compute.

    Attributes:
        mixer: a key of `config.LAYER_KINDS`.
        dense: it is one of the first layers, of which some mixtures have no experts.
    """

    mixer: str
    dense: bool

    @property
    def options(self) -> dict[str, Any]:
        """What the layers of a decoder are told of it; a family's own may not know of what its models do not have."""
        return ({"dense": True} if self.dense else {}) | ({} if self.mixer == "attention" else {"mixer": self.mixer})


class Run(NamedTuple):
    """Layers in turn: layer start + r · period + j is of the j-th kind, for every r < repetitions."""

    start: int
    kinds: tuple[LayerKind, ...]
    repetitions: int

    @property
    def period(self) -> int:
        """Layers until the kinds begin anew."""
        return len(self.kinds)

    @property
    def firsts(self) -> range:
        """The layer with which each repetition begins."""
        return self.turn(0)

    def turn(self, offset: int) -> range:
        """Returns the layers that come so many behind the first of their repetition."""
        first = self.start + offset
        return range(first, first + self.repetitions * self.period, self.period)


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer."""
    return tuple(LayerKind(mixer, layer < config.dense_first) for layer, mixer in enumerate(config.mixers))


def layer_runs(config: ModelConfig) -> tuple[Run, ...]:
    """Returns the runs of all layers of a model, one where all are of one kind."""
    each = layer_kinds(config)
    return tuple(Run(start, each[start : start + period], times) for start, period, times in _patterns(each))


@lru_cache(maxsize=64)
def _patterns(kinds: Sequence[Hashable]) -> tuple[tuple[int, int, int], ...]:
    """Cuts a sequence greedily into the longest parts that repeat: starts, periods and repetitions."""
    found, start = [], 0
    while start < len(kinds):
        period, times = 1, _repetitions(kinds, start, 1)
        for longer in range(2, LONGEST_PERIOD + 1):
            if start + period * times == len(kinds):
                break
            if (more := _repetitions(kinds, start, longer)) > 1 and more * longer > period * times:
                period, times = longer, more
        found.append((start, period, times))
        start += period * times
    return tuple(found)


def _repetitions(kinds: Sequence[Hashable], start: int, period: int) -> int:
    """Counts how often the next `period` kinds come one behind the other."""
    end = start + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return (end - start) // period


def own_number(config: ModelConfig, mixer: str, layer: Layer) -> Layer:
    """Returns a layer's number among those of its kind: its place in the stacks that only these have."""
    own = config.layers_of(mixer)
    if len(own) == config.num_layers:
        return layer
    table = np.zeros(config.num_layers, np.int32)
    table[list(own)] = np.arange(len(own))
    return lax.dynamic_index_in_dim(jnp.asarray(table), layer, keepdims=False)
