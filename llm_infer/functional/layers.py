"""The loop over layers for programs that are differentiated: each layer's weights are cut out of their stacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from llm_infer.models.config import ModelConfig
from llm_infer.models.decoder import Attend, Decoder
from llm_infer.models.experts import ExpertsMLP
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import Params, merge_model
from llm_infer.quant import StoredWeights


def run_layers(
    model: LoadedModel,
    params: Params,
    token_ids: Int[Array, " T"],
    positions: Int[Array, " T"],
    attend: Attend,
    *,
    remat: bool,
    wanted: Sequence[int] = (),
) -> tuple[Float[Array, "T E"], Float[Array, "W T E"]]:
    """Computes hidden states after the last layer, and after each that is `wanted` (0 is the embedding).

    A scan over slices gives each layer's gradient its place in the stack; picking layers out of a stack within the loop
    would make a gradient of the size of all layers for each.

    Args:
        remat: keep what goes into each layer alone, and compute the rest again for the gradient.
    """
    config = model.config
    decoder = merge_model(model.definition, params)
    assert isinstance(decoder, Decoder)
    x, angles = decoder.embed_tokens(token_ids, positions), decoder.angles(positions)
    slot_of = jnp.array([wanted.index(i) if i in wanted else len(wanted) for i in range(config.num_layers + 1)])

    def keep(kept: Array, number: Array, x: Array) -> Array:
        return kept.at[slot_of[number]].set(x, mode="drop") if wanted else kept

    kept = keep(jnp.zeros((len(wanted), *x.shape), x.dtype), jnp.int32(0), x)

    def block(dense: bool, whole: Params, carry: tuple[Array, Array], each: tuple[Array, dict[str, Array]]) -> Any:
        (x, kept), (layer, slices) = carry, each
        own = {name: _alone(params[name], value) for name, value in slices.items()}
        merged = merge_model(model.definition, {**whole, **own})
        assert isinstance(merged, Decoder)
        layers = merged.layers
        if isinstance(layers.mlp, ExpertsMLP):
            layers.mlp.counted = True
        x, _ = layers(x, angles, None, layer, attend, **({"dense": True} if dense else {}))
        return (x, keep(kept, layer + 1, x)), None

    for dense, start, end in ((True, 0, config.dense_first), (False, config.dense_first, config.num_layers)):
        if start < end:
            slices, whole = _cut(params, config, dense, start, end)
            body = partial(block, dense, whole)
            body = jax.checkpoint(body, prevent_cse=False) if remat else body
            (x, kept), _ = lax.scan(body, (x, kept), (jnp.arange(start, end, dtype=jnp.int32), slices))
    return x, kept


def _cut(params: Params, config: ModelConfig, dense: bool, start: int, end: int) -> tuple[dict[str, Array], Params]:
    """Returns the stacks of floating-point numbers over these layers, and all else as it is."""
    own: dict[str, Array] = {}
    for name, value in params.items():
        stack = _stack(value)
        if stack is None or not name.startswith("layers."):
            continue
        if stack.shape[0] == config.num_layers:
            own[name] = stack[start:end]
        elif name.startswith("layers.dense_mlp.") == dense:
            own[name] = stack
    return own, {name: value for name, value in params.items() if name not in own}


def _stack(value: Any) -> Array | None:
    """Returns the array of all layers, where there is one that has a gradient; blocks have none, and stay in their stacks."""
    if not isinstance(value, StoredWeights):
        return value
    return value.blocks[0] if jnp.issubdtype(value.blocks[0].dtype, jnp.floating) and len(value.blocks) == 1 else None


def _alone(value: Any, layer: Array) -> Any:
    """Returns a layer's weights as a stack of one, in which every layer finds itself (see `models.layers.pick`)."""
    if isinstance(value, StoredWeights):
        return replace(value, blocks=(layer[None],), places=((0, 0),))
    return layer[None]
