"""The model as a differentiable function of whole sequences: logits, hidden states, log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from llm_infer.engine.platform import query_rows
from llm_infer.engine.step.sharding import StepSharding
from llm_infer.functional.attention import WithConvolutions, attend_within
from llm_infer.functional.decode import PAGE_SIZE
from llm_infer.functional.layers import run_layers
from llm_infer.functional.over_mesh import of_batch, over_mesh
from llm_infer.functional.paged_rows import attend_by_pages
from llm_infer.models.load import LoadedModel, has_kernels, kernel_params
from llm_infer.models.own import OwnDefinition
from llm_infer.models.params import Params, merge_model
from pallas_kernels.row_sums import logsumexp

Rows = Int[Array, "B T"] | Int[np.ndarray, "B T"]

LOGITS_BLOCK = 128
"""Tokens whose logits exist at the same time in `token_logprobs`."""


class Forward(NamedTuple):
    """What `forward` returns.

    Attributes:
        logits: Float[Array, "B T V"] float32.
        hidden_states: Float[Array, "B T E"] of each layer that was asked for, before the final norm.
    """

    logits: Array
    hidden_states: tuple[Array, ...]


def forward(
    model: LoadedModel,
    params: Params,
    token_ids: Rows,
    *,
    segments: Rows | None = None,
    hidden_states: Sequence[int] = (),
    remat: bool = False,
    page_size: int = PAGE_SIZE,
) -> Forward:
    """Computes logits for every token of whole sequences. To be called under jit; may be differentiated and vmapped.

    A token sees those before it in its row. Rows that are padded at the end need nothing more: nobody sees padding.
    What is not used of the result is not computed.

    Args:
        model: says what is computed; its own parameters are not used.
        params: `model.params`, or others of the same names and shapes.
        token_ids: a sequence in each row.
        segments: of rows that hold several sequences, a number for each token; a run of equal numbers is a sequence, in which
            positions begin anew. Padding may have any number that its neighbour has not.
        hidden_states: layers whose outputs to return; 0 is the embedding, 1 the output of the first layer, -1 of the last.
        remat: compute layers again for the gradient, so that memory holds what goes into each alone.
        page_size: of the engine, or the cache, whose very bits are wanted; rows without segments have them on CPUs in float32.
    """
    token_ids, segments = _checked(token_ids, segments)
    wanted = [_layer(model, each) for each in hidden_states]
    kinds = dict.fromkeys(wanted)  # a layer may be asked for twice

    def run(params: Params, arrays: tuple[Array, Array | None]) -> tuple[Array, tuple[Array, ...]]:
        ids, own = arrays
        params = kernel_params(model, params)
        hidden, kept = _hidden(model, params, ids, own, remat, page_size, list(kinds))
        decoder = merge_model(model.definition, params)
        logits = decoder.logits(hidden).reshape(*ids.shape, -1)
        return logits, tuple(each.reshape(*ids.shape, -1) for each in kept)

    rows = of_batch(model, token_ids.shape[0])
    logits, kept = over_mesh(model, run, params, (token_ids, segments), rows, rows)
    by_layer = dict(zip(kinds, kept, strict=True))
    return Forward(logits, tuple(by_layer[each] for each in wanted))


def token_logprobs(
    model: LoadedModel,
    params: Params,
    token_ids: Rows,
    *,
    segments: Rows | None = None,
    temperature: Array | float = 1.0,
    remat: bool = False,
    page_size: int = PAGE_SIZE,
) -> Float[Array, "B T"]:
    """Computes the log-probability of each token given those before it, float32; 0 for the first of each sequence.

    Logits of a few tokens exist at a time, for the gradient too.

    Args:
        model, params, token_ids, segments, remat, page_size: as of `forward`.
        temperature: by which logits are divided; one number, or an array that broadcasts to [B, T].
    """
    token_ids, segments = _checked(token_ids, segments)
    heat = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), token_ids.shape)

    def run(params: Params, arrays: tuple[Array, Array | None, Array]) -> Array:
        ids, own, heat = arrays
        params = kernel_params(model, params)
        hidden, _ = _hidden(model, params, ids, own, remat, page_size)
        decoder = merge_model(model.definition, params)
        following = jnp.roll(ids, -1, axis=1)
        found = _logprobs(decoder.logits, hidden, following.reshape(-1), jnp.roll(heat, -1, axis=1).reshape(-1))
        shifted = jnp.roll(found.reshape(ids.shape), 1, axis=1)
        return jnp.where(_begins(jnp.zeros_like(ids) if own is None else own), 0.0, shifted)

    rows = of_batch(model, token_ids.shape[0])
    return over_mesh(model, run, params, (token_ids, segments, heat), rows, rows)


def _hidden(
    model: LoadedModel,
    params: Params,
    token_ids: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    remat: bool,
    page_size: int,
    wanted: Sequence[int] = (),
) -> tuple[Float[Array, "N E"], Float[Array, "W N E"]]:
    """Computes hidden states after the last layer and after those `wanted`, of all rows' tokens, N = B · T.

    `params` are as of `kernel_params`.
    """
    place = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32)[None], token_ids.shape)
    if segments is not None:
        begins = _begins(segments)
        place = place - lax.cummax(jnp.where(begins, place, 0), axis=1)
        segments = jnp.cumsum(begins, axis=1, dtype=jnp.int32)  # a number that comes again is another sequence
    platform = StepSharding.of(model.config, model.mesh).platform
    own = jnp.zeros_like(token_ids) if segments is None else segments
    if segments is None and has_kernels(model):
        rows = query_rows(platform, model.config.group_size)
        attend = attend_by_pages(token_ids.shape[0], token_ids.shape[1], page_size, platform, rows)
    else:
        attend = attend_within(own)
    if model.config.recurrent:
        attend = WithConvolutions(attend, own, by_kernel=segments is None and has_kernels(model))
    if isinstance(model.definition, OwnDefinition):
        if wanted:
            raise ValueError("hidden_states: only the last of a registered model are known")
        hidden, _ = merge_model(model.definition, params)(token_ids.reshape(-1), place.reshape(-1), None, attend)
        return hidden, hidden[None][:0]
    return run_layers(
        model,
        params,
        token_ids.reshape(-1),
        place.reshape(-1),
        attend,
        remat=remat,
        wanted=wanted,
    )


def _begins(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Tells which tokens are the first of a run of equal numbers."""
    return jnp.concatenate((jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]), axis=1)


def _logprobs(
    head: Any, hidden: Float[Array, "N E"], targets: Int[Array, " N"], temperature: Float[Array, " N"]
) -> Float[Array, " N"]:
    """Computes log-probabilities of `targets`, in blocks whose logits are computed again for the gradient."""
    count = hidden.shape[0]
    size = min(count, LOGITS_BLOCK)
    padding = -count % size

    @partial(jax.checkpoint, prevent_cse=False)
    def block(rows: Array, ids: Array, heat: Array) -> Array:
        logits = head(rows) / heat[:, None]
        return jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0] - logsumexp(logits)

    def blocks(array: Array, fill: float = 0) -> Array:
        rest = ((0, padding), *((0, 0),) * (array.ndim - 1))
        return jnp.pad(array, rest, constant_values=fill).reshape(-1, size, *array.shape[1:])

    found = lax.map(lambda each: block(*each), (blocks(hidden), blocks(targets), blocks(temperature, 1.0)))
    return found.reshape(-1)[:count]


def _checked(token_ids: Rows, segments: Rows | None) -> tuple[Array, Array | None]:
    """Returns both on the device.

    Raises:
        ValueError: they are not whole numbers of the same two axes.
    """
    token_ids = token_ids if hasattr(token_ids, "ndim") else jnp.asarray(token_ids)
    segments = segments if segments is None or hasattr(segments, "ndim") else jnp.asarray(segments)
    if token_ids.ndim != 2 or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(f"token_ids is {token_ids.dtype}{list(token_ids.shape)}, expected whole numbers [B, T]")
    if segments is not None and segments.shape != token_ids.shape:
        raise ValueError(f"segments is {list(segments.shape)}, expected the shape of token_ids {list(token_ids.shape)}")
    return jnp.asarray(token_ids, jnp.int32), None if segments is None else jnp.asarray(segments, jnp.int32)


def _layer(model: LoadedModel, number: int) -> int:
    layers = model.config.num_layers
    if not -layers - 1 <= number <= layers:
        raise ValueError(f"hidden_states: layer {number}, expected 0 (the embedding) … {layers}, or from the end")
    return number % (layers + 1)
