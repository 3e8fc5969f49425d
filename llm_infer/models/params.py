"""A model as a definition and parameters by name: taken apart, put together, made of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from llm_infer.models.config import ModelConfig
from llm_infer.models.decoder import Decoder
from llm_infer.models.registry import decoder_class

Params = dict[str, Any]
"""Parameters by dotted name, e.g. `layers.attn.qkv.weight`: arrays, or matrices as `StoredWeights`.

Every weight is stacked, so there are about a dozen."""


def split_model(
    config: ModelConfig, dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """The definition of the model and the shape and dtype of each parameter; nothing is allocated."""
    abstract = nnx.eval_shape(lambda: decoder_class(config)(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    definition, state = nnx.split(abstract)
    return definition, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge_model(definition: nnx.GraphDef, params: Params) -> Decoder:
    """The callable model; cheap, meant to be called inside a traced function."""
    flat: dict[Any, Any] = {tuple(name.split(".")): nnx.Param(value) for name, value in params.items()}
    return nnx.merge(definition, nnx.from_flat_state(flat))


def random_params(
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    arrange: Callable[[str, Array], Array] | None = None,
    shardings: Any = None,
) -> Params:
    """Random weights made on the device, for tests and benchmarks (`--load-format dummy`).

    `arrange` and `shardings` (by name) bring them to the devices of a mesh, each its part; the values stay the same.
    """

    @partial(jax.jit, out_shardings=shardings)
    def init() -> Params:
        _, state = nnx.split(decoder_class(config)(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed)))
        flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
        return flat if arrange is None else {name: arrange(name, value) for name, value in flat.items()}

    return init()
