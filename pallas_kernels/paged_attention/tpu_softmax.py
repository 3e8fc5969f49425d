"""Parts of the TPU kernel's online softmax shared by both kinds of items. It is in base 2: log2(e) is in the score factor.

Running maxima are kept equal on all 128 lanes, and sums of weights per lane until an item's end, so that a block of tokens
costs one reduction over lanes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.pages import HALF_LANES, LANES

MASKED = -1e30  # first running maximum: finite, so that exp2(-inf - MASKED) is 0 and never NaN
LOG2E = math.log2(math.e)
ROWS = 8  # sublanes of a register


def dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """Multiplies a [M, X] with b [N, X] (contract 1) or b [X, N] (contract 0), in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def wide(x: jax.Array, width: int) -> jax.Array:
    """Widens [M, 128] with equal lanes to [M, width]: the same registers again."""
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def entries(first_word: Any, place: int, head_dim: int, packing: int) -> tuple[tuple[Any, int], tuple[Any, int]]:
    """Returns (word, number in it) of K and of V, for the head at `place` among those from `first_word` on."""
    k, v = (place, place) if head_dim <= HALF_LANES else (2 * place, 2 * place + 1)
    return (first_word + k // packing, k % packing), (first_word + v // packing, v % packing)


def to_scores(products: jax.Array, factor: jax.Array, softcap: float | None) -> jax.Array:
    """Turns products of q and stored K into scores in base 2; `factor` is made by `score_factor`."""
    return products * factor if softcap is None else jnp.tanh(products * factor) * (softcap * LOG2E)


def score_factor(scale: float, softcap: float | None, k_scale: jax.Array | float | None) -> jax.Array:
    """Returns the factor with which `to_scores` multiplies."""
    factor = scale * LOG2E if softcap is None else scale / softcap
    return jnp.asarray(1.0 if k_scale is None else k_scale, jnp.float32) * factor


def update(
    scores: jax.Array, maximum: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes one step of the online softmax for scores [M, N]; returns weights [M, N], and correction, maximum and total [M,
    128]."""
    rows, width = scores.shape
    columns = [scores[:, i : i + LANES] for i in range(0, width, LANES)]
    highest = columns[0]
    for column in columns[1:]:
        highest = jnp.maximum(highest, column)
    new = jnp.maximum(maximum, jnp.broadcast_to(jnp.max(highest, axis=1, keepdims=True), (rows, LANES)))
    correction = jnp.exp2(maximum - new)
    weights = [jnp.exp2(column - new) for column in columns]
    total = total * correction
    for weight in weights:
        total = total + weight
    return (weights[0] if len(weights) == 1 else jnp.concatenate(weights, axis=1)), correction, new, total


def normalised(acc: jax.Array, total: jax.Array, factor: jax.Array, head_dim: int) -> jax.Array:
    """Returns the results [M, Dp] from sums of weighted values and lane-wise sums of weights."""
    whole = jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), total.shape)
    if head_dim <= HALF_LANES:  # the values lie behind the keys
        acc = jnp.concatenate([acc[:, HALF_LANES:], acc[:, :HALF_LANES]], axis=1)
    return acc * wide(factor / whole, acc.shape[1])
