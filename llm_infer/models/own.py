"""Models that a user has written: functions of parameters and of our attention, served as the built-in ones are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from llm_infer.models.config import ModelConfig
from llm_infer.parallel.axes import ParamSpec

Forward = Callable[..., tuple[Array, Any]]
"""`forward(params, config, token_ids, positions, cache, attend) -> (hidden, cache)`, of T tokens of any sequences."""

Logits = Callable[..., Array]
"""`logits(params, config, hidden) -> logits`, of some tokens."""


@dataclass(frozen=True)
class OwnFamily:
    """A model that a user has written: what a configuration of one has as `own`.

    Attributes:
        forward, logits: the model.
        names: of the parameters, in the order of their tree.
        tree: how the tree is built of them.
        specs: of the parameters, by name.
    """

    forward: Forward
    logits: Logits
    names: tuple[str, ...]
    tree: Any
    specs: Mapping[str, ParamSpec]

    def __hash__(self) -> int:
        return hash((self.forward, self.logits, self.names))


@dataclass(frozen=True)
class OwnDefinition:
    """What is computed, apart from parameters: takes the place of a module's definition."""

    family: OwnFamily
    config: ModelConfig


class OwnDecoder:
    """The model with parameters: has what step programs ask of a `Decoder`."""

    def __init__(self, definition: OwnDefinition, params: Mapping[str, Any]) -> None:
        self._family, self._config = definition.family, definition.config
        leaves = [params[name] for name in self._family.names]
        self._params = jax.tree.unflatten(self._family.tree, leaves)

    def __call__(
        self, token_ids: Array, positions: Array, cache: Any, attend: Any, *, loop: Any = 1
    ) -> tuple[Array, Any]:
        """Computes hidden states of all tokens, and the cache; the loop over layers is the model's own."""
        config = self._config
        heads = (config.num_heads // config.shards.devices, config.num_kv_heads // config.shards.devices)

        def checked(
            query: Array, key: Array, value: Array, cache: Any, layer: Any, /, **options: Any
        ) -> tuple[Array, Any]:
            for name, array, count in (("query", query, heads[0]), ("key", key, heads[1]), ("value", value, heads[1])):
                expected = (len(token_ids), count, config.head_dim)
                if tuple(array.shape) != expected:
                    raise ValueError(
                        f"attend: {name} has the shape {list(array.shape)}, the config says {list(expected)}"
                    )
            if not isinstance(layer, Tracer) and not 0 <= int(layer) < config.num_layers:
                raise ValueError(f"attend: layer {int(layer)}, the config says num_layers={config.num_layers}")
            return attend(query, key, value, cache, jnp.asarray(layer, jnp.int32), **options)

        hidden, cache = self._family.forward(self._params, config, token_ids, positions, cache, checked)
        if hidden.ndim != 2 or len(hidden) != len(token_ids):
            raise ValueError(f"forward returned hidden states {list(hidden.shape)}, expected [{len(token_ids)}, E]")
        return hidden, cache

    def normed(self, hidden: Array) -> Array:
        """Returns hidden states for embeddings: those that `logits` takes."""
        return hidden

    def logits(self, hidden: Array) -> Array:
        """Computes the scores of all tokens of the vocabulary."""
        found = self._family.logits(self._params, self._config, hidden)
        if found.shape != (len(hidden), self._config.vocab_size):
            expected = [len(hidden), self._config.vocab_size]
            raise ValueError(f"logits returned {list(found.shape)}, the config says {expected}")
        return found.astype(jnp.float32)


def tree_names(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Returns dotted names, leaves and structure of a tree."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    return (
        [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in pairs],
        [x for _, x in pairs],
        structure,
    )
