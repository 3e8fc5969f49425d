"""A model as a definition and parameters by name: taken apart, put together, counted, made of random numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.decoder import Decoder
from llm_infer.models.own import OwnDecoder, OwnDefinition
from llm_infer.models.registry import decoder_class
from llm_infer.parallel.axes import ParamSpec

Params = dict[str, Any]
"""Parameters by dotted name, e.g. `layers.attn.qkv.weight`: arrays, or matrices as `StoredWeights`.

Every weight is stacked, so there are about a dozen."""

Definition = nnx.GraphDef | OwnDefinition
"""What is computed, apart from parameters."""

Specs = Mapping[str, ParamSpec]
"""What the modules of a model declare of each parameter, by dotted name."""


@lru_cache(maxsize=64)
def split_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> tuple[Definition, Specs]:
    """Returns the definition of the model and what it declares of its parameters; no array is made."""
    if config.own is not None:
        return OwnDefinition(config.own, config), config.own.specs
    definition, state = nnx.split(decoder_class(config)(config, dtype=jnp.dtype(dtype)))
    specs = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    return definition, MappingProxyType(specs)


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes the parameters of a model for programs that are only traced or compiled."""
    _, specs = split_model(config, dtype)
    return {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in specs.items()}


def merge_model(definition: Definition, params: Params) -> Decoder | OwnDecoder:
    """Returns the callable model; cheap, meant to be called inside a traced function."""
    if isinstance(definition, OwnDefinition):
        return OwnDecoder(definition, params)
    flat: dict[Any, Any] = {tuple(name.split(".")): nnx.Param(value) for name, value in params.items()}
    return nnx.merge(definition, nnx.from_flat_state(flat))


def without_values(params: Params) -> Params:
    """Returns parameters of which only shape, type and place are there; `missing` names them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)


def missing(params: Params) -> list[str]:
    """Returns the names of parameters without values."""
    return [n for n, v in params.items() if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(v))]


def refuse_deleted(arrays: Mapping[str, Any]) -> None:
    """Refuses arrays whose memory is gone, because a jitted function was given them to donate.

    Raises:
        ModelError: it names the first of them.
    """
    for name, value in arrays.items():
        if any(isinstance(leaf, Array) and leaf.is_deleted() for leaf in jax.tree.leaves(value)):
            raise ModelError(
                f"{name} was deleted, as by a jitted function that was given it to donate: update the weights with the arrays "
                "that such a function returns, or with copy=True"
            )


def refuse_absent(params: Params) -> None:
    """Refuses parameters without values.

    Raises:
        ModelError: weights have been given up (`Runner.sleep`), or deleted.
    """
    if gone := missing(params):
        raise ModelError(f"the weights were given up: {listed(gone)}")
    refuse_deleted(params)


def listed(names: list[str]) -> str:
    """Returns the first of some names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def num_parameters(config: ModelConfig) -> int:
    """Counts the weights of a model."""
    _, specs = split_model(config)
    return sum(spec.size for spec in specs.values())


def random_params(
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    arrange: Callable[[str, Array], Array] | None = None,
    shardings: Any = None,
) -> Params:
    """Makes random weights on the device, for tests and benchmarks (`--load-format dummy`).

    The values of a parameter depend on the seed and its name alone. `arrange` and `shardings` (by name) bring them to
    the devices of a mesh, each its part; the values stay the same.
    """
    _, specs = split_model(config, dtype)

    @partial(jax.jit, out_shardings=shardings)
    def init() -> Params:
        values = {name: _draw(spec, name, seed) for name, spec in specs.items()}
        return values if arrange is None else {name: arrange(name, value) for name, value in values.items()}

    return init()


def _draw(spec: ParamSpec, name: str, seed: int) -> Array:
    if not spec.std:
        return jnp.full(spec.shape, spec.mean, spec.dtype)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return spec.mean + spec.std * jax.random.normal(key, spec.shape, spec.dtype)
