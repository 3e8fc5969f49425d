"""draw_tokens in XLA, on any device: one function that serves a batch in which every row has its own limits.

It sorts no vocabulary and draws no random number per token. A row first looks at its most likely tokens only; where these
provably hold all that its limits keep, it draws among them. Other rows find their thresholds over the whole vocabulary by
bisection over the bits of the logits. The draw inverts the cumulative distribution with one uniform number per row. A
row's token depends on nothing but the row itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.dispatch import Case
from pallas_kernels.draw_tokens.limits import CANDIDATES, Limits
from pallas_kernels.draw_tokens.top_tokens import top_token, top_tokens, unsigned_zeros

BLOCK = 128
"""Tokens per block of the two-level cumulative sum."""

ROWS_AT_ONCE = 8
"""Rows of the whole vocabulary that are searched together on CPUs."""


def why_not(case: Case) -> str | None:
    """Refuses nothing."""
    return None


def ordered_bits(x: Float[Array, "S V"]) -> UInt32[Array, "S V"]:
    """Returns unsigned integers in the order of the floats; both zeros are one."""
    bits = lax.bitcast_convert_type(unsigned_zeros(x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def largest_threshold(
    keys: UInt32[Array, "S V"], weights: Float[Array, "S V"], target: Float[Array, " S"]
) -> UInt32[Array, " S"]:
    """Returns per row the largest threshold `t` with `sum(weights[keys >= t]) >= target`, by bisection over its bits."""

    def bit(i: Array, threshold: Array) -> Array:
        trial = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(keys >= trial[:, None], weights, 0.0), axis=-1)
        return jnp.where(mass >= target, trial, threshold)

    return lax.fori_loop(0, 32, bit, jnp.zeros(keys.shape[0], jnp.uint32))


def surprise(scaled: Float[Array, "S V"], kept: Bool[Array, "S V"]) -> tuple[Float[Array, "S V"], Float[Array, "S V"]]:
    """Returns how far each token's information is from the mean over the kept ones (the entropy), and its probability.

    That is how far `-scaled`, the information plus a number that is the same for all, is from its mean. The distance is
    infinite for tokens that are not kept (locally typical sampling, Meister et al., 2023). `scaled` has maximum 0.
    """
    mass = jnp.where(kept, jnp.exp(scaled), 0.0)
    p = mass / jnp.sum(mass, axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(p > 0, p * -scaled, 0.0), axis=-1, keepdims=True)
    return jnp.where(p > 0, jnp.abs(-scaled - mean), jnp.inf), p


def most_likely(scaled: Float[Array, "S V"], limits: Limits) -> Bool[Array, "S V"]:
    """Returns the tokens that top-k keeps."""
    vocab = scaled.shape[-1]
    limited = (limits.top_k > 0) & (limits.top_k < vocab)
    counts = jnp.where(limited, limits.top_k, vocab).astype(jnp.float32)

    def by_count(kept: Array) -> Array:
        keys = ordered_bits(scaled)
        return kept & (keys >= largest_threshold(keys, jnp.ones_like(scaled), counts)[:, None])

    return lax.cond(jnp.any(limited), by_count, lambda kept: kept, scaled > -jnp.inf)


def kept_tokens(scaled: Float[Array, "S V"], limits: Limits) -> Bool[Array, "S V"]:
    """Returns the tokens that top-k, then top-p, min-p and typical-p over the rest keep. Ties with the last one are kept.

    `scaled` has been divided by the temperature and has maximum 0.
    """

    def by_mass(kept: Array) -> Array:
        mass = jnp.where(kept, jax.nn.softmax(scaled, axis=-1), 0.0)
        keys = ordered_bits(scaled)
        threshold = largest_threshold(keys, mass, limits.top_p * jnp.sum(mass, axis=-1))
        # top_p = 1 keeps all, even what rounding of the mass would lose.
        return kept & ((keys >= threshold[:, None]) | (limits.top_p >= 1.0)[:, None])

    def by_surprise(kept: Array) -> Array:
        distance, p = surprise(scaled, kept)
        near = ordered_bits(-distance)
        threshold = largest_threshold(near, p, limits.typical_p * jnp.sum(p, axis=-1))
        return kept & ((near >= threshold[:, None]) | (limits.typical_p >= 1.0)[:, None])

    kept = lax.cond(jnp.any(limits.top_p < 1.0), by_mass, lambda kept: kept, most_likely(scaled, limits))
    kept = kept & (scaled >= jnp.log(limits.min_p)[:, None])
    return lax.cond(jnp.any(limits.typical_p < 1.0), by_surprise, lambda kept: kept, kept)


def limited(logits: Float[Array, "S V"], limits: Limits) -> Float[Array, "S V"]:
    """Returns the logits of what `draw_tokens` draws from: divided by the temperature, -inf for tokens that no limit keeps.

    Rows with temperature 0, of which nothing is drawn, stay as they are. What is kept counts as fixed for the gradient.
    """
    scaled = scale(logits, limits)
    kept = jnp.where(kept_tokens(lax.stop_gradient(scaled), limits), scaled, -jnp.inf)
    return jnp.where((limits.temperature > 0)[:, None], kept, logits)


def invert_cdf(mass: Float[Array, "S V"], uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Returns per row the first token whose cumulative mass exceeds `uniform` × total; never one without mass, 0 if none has
    any."""
    vocab = mass.shape[-1]
    blocks = jnp.pad(mass, ((0, 0), (0, -vocab % BLOCK))).reshape(mass.shape[0], -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]

    def pick(ends: Array, mass: Array, target: Array) -> Array:
        # By rounding, sums in a tree may rise or fall where nothing was added, and the target may lie at the very end.
        place, drawable = lax.broadcasted_iota(jnp.int32, mass.shape, 1), mass > 0
        passed = jnp.where(drawable & (ends > target[:, None]), place, mass.shape[-1])
        last = jnp.max(jnp.where(drawable, place, 0), axis=-1)
        return jnp.minimum(jnp.min(passed, axis=-1), last)

    block = pick(ends, sums, target)
    start = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    inside = pick(jnp.cumsum(chosen, axis=-1), chosen, target - start)
    return (block * BLOCK + inside).astype(jnp.int32)


def scale(logits: Float[Array, "S V"], limits: Limits) -> Float[Array, "S V"]:
    """Returns the logits less their maximum, divided by the temperature."""
    temperature = jnp.where(limits.temperature <= 0.0, 1.0, limits.temperature)
    logits = logits.astype(jnp.float32)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]


def kept_candidates(
    scaled: Float[Array, "S N"], whole: Float[Array, " S"], limits: Limits
) -> tuple[Bool[Array, "S N"], Bool[Array, " S"]]:
    """Returns what `kept_tokens` would, among the most likely tokens in descending order, and the rows for which these are
    enough.

    They are enough where the last candidate is not kept: then nothing below it is either. `whole` is the sum of `exp(scaled)`
    over what top-k keeps of the vocabulary; only rows with top-p that keep more than the candidates need it.
    """
    size = scaled.shape[-1]
    limited = limits.top_k > 0
    kth = jnp.take_along_axis(scaled, jnp.clip(limits.top_k, 1, size)[:, None] - 1, axis=1)
    kept = (scaled > -jnp.inf) & (~limited[:, None] | (scaled >= kth))
    mass = jnp.where(kept, jnp.exp(scaled), 0.0)
    total = jnp.where(limited & (limits.top_k <= size), jnp.sum(mass, axis=-1), whole)
    reached = jnp.cumsum(mass, axis=-1) >= (limits.top_p * total)[:, None]
    # Kept is everything up to the first candidate that reaches the mass, and what equals it.
    last = jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), size - 1)
    threshold = jnp.take_along_axis(scaled, last[:, None], axis=1)
    kept &= (scaled >= threshold) | (limits.top_p >= 1.0)[:, None]
    kept &= scaled >= jnp.log(limits.min_p)[:, None]
    enough = ~kept[:, -1]

    def by_surprise(kept: Array) -> Array:
        distance, p = surprise(scaled, kept)
        ordered, weights = lax.sort((distance, p), num_keys=1)
        before = jnp.sum(jnp.cumsum(weights, axis=-1) < limits.typical_p[:, None], axis=-1)
        furthest = jnp.take_along_axis(ordered, jnp.minimum(before, size - 1)[:, None], axis=1)
        return kept & ((distance <= furthest) | (limits.typical_p >= 1.0)[:, None])

    return lax.cond(jnp.any(limits.typical_p < 1.0), by_surprise, lambda kept: kept, kept), enough


def without_limits(limits: Limits, which: Bool[Array, " S"]) -> Limits:
    """Returns the limits without those of some rows: what nobody reads must not cost the batch a search for thresholds."""
    neutral = {"top_k": -1, "top_p": 1.0, "typical_p": 1.0}
    changed = {name: jnp.where(which, value, getattr(limits, name)) for name, value in neutral.items()}
    return limits._replace(**changed)


def draw_from_all(logits: Float[Array, "S V"], limits: Limits, uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Draws a random token of each row among all that its limits keep."""
    scaled = scale(logits, limits)
    return invert_cdf(jnp.where(kept_tokens(scaled, limits), jnp.exp(scaled), 0.0), uniform)


def in_row_blocks(logits: Float[Array, "S V"], limits: Limits, uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Draws like `draw_from_all`, a few rows at a time: what a search for thresholds reads repeatedly stays in the cache.

    Temporaries of the whole batch would come from the system anew in every step (glibc gives back what is above 32 MB),
    and touching them took longer than the draw.
    """
    num_rows = logits.shape[0]
    size = next(size for size in range(ROWS_AT_ONCE, 0, -1) if num_rows % size == 0)
    blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (logits, limits, uniform))
    return lax.map(lambda block: draw_from_all(*block), blocks).reshape(-1)


def draw(logits: Float[Array, "S V"], limits: Limits, uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Draws a random token for rows with a temperature above 0 and a finite largest logit; for others, takes the most likely
    one."""
    values, ids = top_tokens(logits, min(CANDIDATES, logits.shape[-1]))
    drawn = (limits.temperature > 0.0) & jnp.isfinite(values[:, 0])
    limits = without_limits(limits, ~drawn)
    scaled = scale(values, limits)
    by_total = drawn & ((limits.top_k <= 0) | (limits.top_k > values.shape[-1])) & (limits.top_p < 1.0)

    def sum_all(_: None) -> Array:
        scaled, wide = scale(logits, limits), limits._replace(top_k=jnp.where(by_total, limits.top_k, -1))
        return jnp.sum(jnp.where(most_likely(scaled, wide), jnp.exp(scaled), 0.0), axis=-1)

    whole = lax.cond(jnp.any(by_total), sum_all, lambda _: jnp.ones_like(uniform), None)
    kept, enough = kept_candidates(scaled, whole, limits)
    place = invert_cdf(jnp.where(kept, jnp.exp(scaled), 0.0), uniform)
    chosen = jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]

    def from_all(chosen: Array) -> Array:
        arguments = logits, without_limits(limits, enough), uniform
        found = lax.platform_dependent(*arguments, cpu=in_row_blocks, default=draw_from_all)
        return jnp.where(enough, chosen, found)

    chosen = lax.cond(jnp.any(drawn & ~enough), from_all, lambda chosen: chosen, chosen)
    return jnp.where(drawn, chosen, ids[:, 0])


def draw_tokens(logits: Float[Array, "S V"], limits: Limits, uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Draws in XLA, see `pallas_kernels.draw_tokens.draw_tokens`. A batch with only greedy rows takes the argmax, nothing
    else."""
    greedy = jnp.all(limits.temperature <= 0.0)
    return lax.cond(greedy, lambda: top_token(logits), lambda: draw(logits, limits, uniform))
