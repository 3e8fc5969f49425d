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
from llm_infer.models.layer_runs import Run, layer_runs
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

    def block(run: Run, carry: tuple[Array, Array], each: tuple[Array, tuple[dict[str, Array], ...]]) -> Any:
        (x, kept), (first, slices) = carry, each
        for offset, (kind, of_layer) in enumerate(zip(run.kinds, slices, strict=True)):
            layer = first + offset if offset else first
            own = {name: _alone(params[name], value) for name, value in of_layer.items()}
            merged = merge_model(model.definition, {**params, **own})
            assert isinstance(merged, Decoder)
            layers = merged.layers
            if isinstance(layers.mlp, ExpertsMLP):
                layers.mlp.counted = True
            x, _ = layers(x, angles, None, layer, attend, **kind.options)
            kept = keep(kept, layer + 1, x)
        return (x, kept), None

    for run in layer_runs(config):
        slices = tuple(_cut(params, config, run, offset) for offset in range(run.period))
        body = partial(block, run)
        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        (x, kept), _ = lax.scan(body, (x, kept), (jnp.array(run.firsts, jnp.int32), slices))
    return x, kept


def _cut(params: Params, config: ModelConfig, run: Run, offset: int) -> dict[str, Array]:
    """Returns the stacks of floating-point numbers over the layers that take the same turn of a run."""
    found: dict[str, Array] = {}
    for name, value in params.items():
        stack = _stack(value)
        if stack is None or not name.startswith("layers."):
            continue
        places = [place for place, layer in enumerate(_layers_of(name, config)) if layer in run.turn(offset)]
        if places:
            step = places[1] - places[0] if len(places) > 1 else 1
            found[name] = stack[places[0] : places[-1] + 1 : step]
    return found


def _layers_of(name: str, config: ModelConfig) -> Sequence[int]:
    """Returns the layers that have a parameter."""
    part, dense = name.split(".")[1], config.dense_first
    own = {"dense_mlp": range(dense), "mlp": range(dense, config.num_layers)}
    own |= {"attn": config.layers_of("attention"), "conv": config.layers_of("conv")}
    return own.get(part, range(config.num_layers))


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
