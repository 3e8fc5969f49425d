"""Causal attention and convolution over whole sequences, without a cache: for training, scoring and hidden states."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from llm_infer.models.decoder import Attend
from pallas_kernels.causal_conv import StateRows
from pallas_kernels.causal_conv import causal_conv as kernel

QUERY_BLOCK = 128
"""Queries whose scores exist at the same time."""


def attend_within(segments: Int[Array, "B T"]) -> Attend:
    """Makes what a model attends with: each token sees those before it in its row that have its segment, and itself."""
    batch, length = segments.shape

    def attend(query: Array, key: Array, value: Array, cache: Any, layer: Array, **options: Any) -> tuple[Array, Any]:
        q, k, v = (each.reshape(batch, length, *each.shape[1:]) for each in (query, key, value))
        return causal_attention(q, k, v, segments, **options).reshape(query.shape), cache

    return attend


class WithConvolutions:
    """What a model with short convolutions computes whole rows with: something to attend with, and convolutions beside it."""

    def __init__(self, attend: Attend, segments: Int[Array, "B T"], *, by_kernel: bool) -> None:
        """Takes what attends; `by_kernel` has the engine's kernel convolve, for rows of one segment."""
        self._attend, self._segments, self._by_kernel = attend, segments, by_kernel

    def __call__(self, *arrays: Any, **options: Any) -> tuple[Array, Any]:
        """Implements `Attend`."""
        return self._attend(*arrays, **options)

    def causal_conv(
        self, inputs: Float[Array, "N C"], taps: Float[Array, "C K"], cache: Any, layer: Array, /
    ) -> tuple[Float[Array, "N C"], Any]:
        """Computes the convolution of every row; a token sees none of another segment. N = B · T."""
        rows = inputs.reshape(*self._segments.shape, -1)
        found = conv_by_kernel(rows, taps) if self._by_kernel else causal_conv(rows, taps, self._segments)
        return found.reshape(inputs.shape), cache


@jax.custom_vjp
def conv_by_kernel(inputs: Float[Array, "B T C"], taps: Float[Array, "C K"]) -> Float[Array, "B T C"]:
    """Computes `causal_conv` of rows that are a segment each with the bits of the engine; XLA may round otherwise."""
    rows, length, channels = inputs.shape
    null = jnp.zeros(rows, jnp.int32)
    begins = jnp.arange(rows + 1, dtype=jnp.int32) * length
    states = jnp.zeros((1, 1, taps.shape[1] - 1, channels), inputs.dtype)
    out, _ = kernel(inputs.reshape(-1, channels), taps, states, StateRows(begins, null, null, null), 0)
    return out.reshape(inputs.shape)


def _conv_and_arguments(inputs: Array, taps: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv_by_kernel(inputs, taps), (inputs, taps)


def _conv_changes(arguments: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    segments = jnp.zeros(arguments[0].shape[:2], jnp.int32)
    return jax.vjp(lambda inputs, taps: causal_conv(inputs, taps, segments), *arguments)[1](change)


conv_by_kernel.defvjp(_conv_and_arguments, _conv_changes)


def causal_conv(
    inputs: Float[Array, "B T C"], taps: Float[Array, "C K"], segments: Int[Array, "B T"]
) -> Float[Array, "B T C"]:
    """Computes y[t] = Σ_k taps[:, k] · x[t - K + 1 + k] over those before t that have its segment, in float32."""
    width, length = taps.shape[1], inputs.shape[1]
    found = jnp.zeros(inputs.shape, jnp.float32)
    for tap in range(width):
        back = width - 1 - tap
        shifted = jnp.pad(inputs, ((0, 0), (back, 0), (0, 0)))[:, :length].astype(jnp.float32)
        # No segment has the number -1; zeros that are shifted in are those of nobody.
        of = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
        seen = (of == segments)[:, :, None]
        found = found + jnp.where(seen, shifted, 0.0) * taps[:, tap].astype(jnp.float32)[None, None]
    return found.astype(inputs.dtype)


def causal_attention(
    query: Float[Array, "B T Hq D"],
    key: Float[Array, "B T Hkv D"],
    value: Float[Array, "B T Hkv D"],
    segments: Int[Array, "B T"],
    *,
    scale: float,
    window: Array | int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " Hq"] | None = None,
) -> Float[Array, "B T Hq D"]:
    """Attends in blocks of queries, whose scores are computed again for the gradient; options as of `paged_attention`.

    Windows count tokens of the row, which within a segment are those of the segment. Scores and sums are float32.
    """
    batch, length, heads, dim = query.shape
    groups = key.shape[2]
    size = min(QUERY_BLOCK, length)
    padding = -length % size
    padded = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, -1, size, groups, heads // groups, dim), 1, 0)
    own = jnp.moveaxis(jnp.pad(segments, ((0, 0), (0, padding))).reshape(batch, -1, size), 1, 0)
    keys, values = key.astype(jnp.float32), value.astype(jnp.float32)
    places = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.arange(0, length + padding, size, dtype=jnp.int32)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(queries: Array, segment: Array, start: Array) -> Array:
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", queries.astype(jnp.float32), keys) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        age = (start + jnp.arange(size, dtype=jnp.int32))[:, None] - places[None]
        seen = age >= 0
        if window is not None:
            seen &= age < window
        seen = seen[None] & (segment[:, :, None] == segments[:, None])
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        most = jnp.max(scores, axis=-1, keepdims=True)
        sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, groups, -1, 1, 1)
        if sink is not None:
            most = jnp.maximum(most, sink)
        # A row of padding behind the last sees nothing.
        most = lax.stop_gradient(jnp.where(jnp.isfinite(most), most, 0.0))
        exps = jnp.exp(scores - most)
        total = jnp.sum(exps, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1.0, total) if sink is None else total + jnp.exp(sink - most)
        return jnp.einsum("bhgqk,bkhd->bqhgd", exps / total, values).astype(query.dtype)

    out = lax.map(lambda each: block(*each), (blocks, own, starts))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, dim)[:, :length]
