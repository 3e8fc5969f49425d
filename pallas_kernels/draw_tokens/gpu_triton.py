"""draw_tokens on a GPU through Pallas' Triton lowering: a thread block draws for a row. The host would wait for XLA's loops.

As on CPUs (`cpu_kernel`): a token's cost is how far its logit, divided by the temperature, is below the largest, and thresholds
of the cost are found by a search over the bits of floats. Where a cost is known that includes all that a row can keep, the few
tokens up to it are first listed, and all else is done on the list. A pass asks three thresholds at once, adds up in every lane
until its end, and loads the next tokens before it uses the last ones: to wait in each block is most of the time otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Case
from pallas_kernels.draw_tokens.limits import ALL_BITS, CANDIDATES, FINITE, SMALLEST, WEIGHTLESS, Limits
from pallas_kernels.gpu_devices import why_not_capability

BLOCK, WARPS = 2048, 8
"""Tokens at which a thread block looks together, and its warps."""
LISTED = 8192
"""Most tokens of a list."""
BOUNDS = 4.0, 8.0, 16.0
"""Costs up to which tokens may be listed."""
Of = Callable[[jax.Array], tuple[jax.Array, ...]]
State = TypeVar("State", bound=Any)


def why_not(case: Case) -> str | None:
    """Refuses all but NVIDIA GPUs from Ampere on."""
    return why_not_capability(case.device_kind, (8, 0), "for Triton")


def draw_tokens(logits: jax.Array, limits: Limits, uniform: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Draws on a GPU, see `pallas_kernels.draw_tokens.draw_tokens`; `interpret` runs the kernel in Pallas' interpreter."""
    arguments = (limits.temperature, limits.top_p, limits.highest_cost(), limits.typical_p, uniform)
    rows, vocab = logits.shape
    # Tokens that are not listed have a place behind the list each: the interpreter puts back what it finds there.
    size = min(LISTED, vocab) + BLOCK
    shapes = ((rows,), jnp.int32), ((rows, size), jnp.float32), ((rows, size), jnp.int32)
    return pl.pallas_call(
        functools.partial(_kernel, interpret),
        grid=(rows,),
        out_shape=tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="draw_tokens",
    )(logits.astype(jnp.float32), jnp.stack(arguments, axis=1), limits.top_k)[0]


def _kernel(interpret: bool, logits_ref, limits_ref, top_k_ref, out_ref, list_ref, ids_ref) -> None:
    row, vocab = pl.program_id(0), logits_ref.shape[1]
    temperature, top_p, highest, typical_p, uniform = (limits_ref[row, i] for i in range(5))
    top_k, list_size = top_k_ref[row], list_ref.shape[1] - BLOCK
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    f32, none, zero = jnp.float32, jnp.float32(0.0), jnp.int32(0)
    lanes = jnp.zeros(place.shape, f32)

    def load(b: jax.Array, length: jax.Array | None) -> jax.Array:
        """Loads the logits of a block of the vocabulary, or of the list if it has a length; -inf behind it, and for NaN."""
        at = b * BLOCK + place
        here = at < vocab if length is None else (length < 0) & (at < vocab)
        x = plgpu.load(logits_ref.at[row, at], mask=here, other=-jnp.inf)
        if length is not None:
            x = jnp.maximum(x, plgpu.load(list_ref.at[row, at], mask=at < length, other=-jnp.inf))
        return jnp.where(x == x, x, -jnp.inf)

    def walk(
        visit: Callable[[jax.Array, jax.Array, State], State],
        state: State,
        length: jax.Array | None = None,
        when: jax.Array | bool = True,
    ) -> State:
        """Returns the state after a pass over the list, or the vocabulary if its length is negative or None.

        `visit(b, x, state)` takes each block's number and logits. There is no pass unless `when`.
        """

        def step(b: jax.Array, carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            following = load(b + 1, length)
            return following, visit(b, *carry)

        size = jnp.int32(vocab) if length is None else jnp.where(length < 0, vocab, length)
        blocks = jnp.where(when, lax.div(size + (BLOCK - 1), jnp.int32(BLOCK)), zero)
        return lax.fori_loop(zero, blocks, step, (load(zero, length), state))[1]

    def first(holds: Callable[[jax.Array, jax.Array], jax.Array], length: jax.Array | None = None) -> jax.Array:
        """Returns the first token for which `holds(ids, x)`; the vocabulary's size if there is none."""

        def look(b: jax.Array, x: jax.Array, found: jax.Array) -> jax.Array:
            ids = ids_of(b, length)
            return jnp.minimum(found, jnp.where(holds(ids, x), ids, vocab))

        return jnp.min(walk(look, jnp.full(place.shape, vocab, jnp.int32), length))

    def ids_of(b: jax.Array, length: jax.Array | None) -> jax.Array:
        at = b * BLOCK + place
        if length is None:
            return at
        return jnp.where(length < 0, at, plgpu.load(ids_ref.at[row, at], mask=at < length, other=vocab))

    largest = jnp.max(walk(lambda _, x, found: jnp.maximum(found, x), lanes - jnp.inf))
    sampled = (temperature >= SMALLEST) & (largest > -jnp.inf) & (largest < jnp.inf)

    @pl.when(~sampled)
    def _greedy() -> None:
        out_ref[row] = first(lambda _, x: x == largest)

    @pl.when(sampled)
    def _sampled() -> None:
        coldness = 1.0 / temperature

        def cost(x: jax.Array) -> jax.Array:
            # Its bits are the same wherever it is computed: a difference of quotients could be contracted into one operation.
            return jnp.abs((largest - x) * coldness)  # -0 has other bits than 0

        def totals(
            of: Of, length: jax.Array | None, count: int = 1, when: jax.Array | bool = True
        ) -> tuple[jax.Array, ...]:
            """Returns the sums of `count` functions of the cost; zeros unless `when`."""

            def add(_: jax.Array, x: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                return tuple(sum_ + each for sum_, each in zip(sums, of(cost(x)), strict=True))

            return tuple(jnp.sum(each) for each in walk(add, (lanes,) * count, length, when))

        def smallest(low: jax.Array, most: jax.Array, weigh: Of, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
            """Returns the smallest int32 from `low` to `most` up to which the tokens weigh enough; up to `most` they do.

            `weigh(cost)` gives tokens' weights, and the bits that are compared with the number.
            """

            def quarter(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                low, high = bounds
                span = high - low
                whole, rest = lax.shift_right_logical(span, jnp.int32(2)), span & 3
                places = [low + whole * i + lax.shift_right_logical(rest * i, jnp.int32(2)) for i in (1, 2, 3)]

                def up_to_each(c: jax.Array) -> tuple[jax.Array, ...]:
                    weight, bits = weigh(c)
                    return tuple(jnp.where(bits <= at, weight, 0.0) for at in places)

                for at, total in reversed(list(zip(places, totals(up_to_each, length, 3), strict=True))):
                    high = jnp.where(enough(total), at, high)
                    low = jnp.where(enough(total), low, jnp.maximum(low, at + 1))
                return low, high

            return lax.while_loop(lambda bounds: bounds[0] < bounds[1], quarter, (low, most))[1]

        limited, wanted, by_mass = (top_k > 0) & (top_k < vocab), top_k.astype(f32), top_p < 1.0

        def counts_and_masses(c: jax.Array) -> tuple[jax.Array, ...]:
            mass = jnp.exp(-c)
            counts = (jnp.where(c <= bound, 1.0, 0.0) for bound in BOUNDS)
            return *counts, *(jnp.where(c <= bound, mass, 0.0) for bound in BOUNDS), jnp.where(c < jnp.inf, mass, 0.0)

        narrow = limited | by_mass | (highest <= BOUNDS[-1])
        *sums, all_mass = totals(counts_and_masses, None, 2 * len(BOUNDS) + 1, narrow)
        bound, length = none, jnp.int32(-1)
        for at, count, mass in reversed(list(zip(BOUNDS, sums[: len(BOUNDS)], sums[len(BOUNDS) :], strict=True))):
            by_limit = jnp.where(by_mass, mass >= top_p * all_mass, highest <= at)
            fits = narrow & jnp.where(limited, count >= wanted, by_limit) & (count <= list_size)
            bound, length = jnp.where(fits, at, bound), jnp.where(fits, count.astype(jnp.int32), length)

        def list_block(b: jax.Array, x: jax.Array, listed: jax.Array) -> jax.Array:
            chosen = cost(x) <= bound
            at = jnp.where(chosen, listed + jnp.cumsum(chosen.astype(jnp.int32)) - 1, list_size + place)
            plgpu.store(list_ref.at[row, at], x, mask=chosen)
            plgpu.store(ids_ref.at[row, at], b * BLOCK + place, mask=chosen)
            return listed + jnp.sum(chosen.astype(jnp.int32))

        walk(list_block, zero, when=length >= 0)
        if not interpret:
            plgpu.debug_barrier()  # threads read what others wrote

        # A search from `low` to `low` takes no step: thus a limit is left out.
        limit = jnp.int32(FINITE)
        limit = smallest(
            jnp.where(limited, zero, limit), limit, lambda c: (lanes + 1.0, _bits(c)), lambda total: total >= wanted
        )

        def mass_to(bound: jax.Array) -> Callable[[jax.Array], jax.Array]:
            return lambda c: jnp.where(_bits(c) <= bound, jnp.exp(-c), 0.0)

        (mass,) = totals(lambda c: (mass_to(limit)(c),), length, when=by_mass & limited)
        share = top_p * jnp.where(limited, mass, all_mass)
        most = jnp.minimum(limit, jnp.where(by_mass, jnp.int32(WEIGHTLESS), jnp.int32(FINITE)))
        limit = smallest(
            jnp.where(by_mass, zero, most), most, lambda c: (jnp.exp(-c), _bits(c)), lambda total: total >= share
        )
        limit = jnp.minimum(limit, _bits(highest))
        kept_mass = mass_to(limit)
        kept, whole = totals(lambda c: (jnp.where(_bits(c) <= limit, 1.0, 0.0), kept_mass(c)), length, 2)

        # A token's information is its cost plus a number that is the same for all: it is as far from the entropy as its cost is
        # from the mean cost (locally typical sampling, Meister et al., 2023).
        typical = typical_p < 1.0

        def weighted(c: jax.Array) -> tuple[jax.Array, ...]:
            return (jnp.where(kept_mass(c) > 0.0, kept_mass(c) * c, 0.0),)

        mean = totals(weighted, length, when=typical)[0] / whole

        def from_mean(c: jax.Array) -> jax.Array:
            return _bits(jnp.abs(c - mean))

        everywhere = jnp.where(typical, jnp.int32(WEIGHTLESS), jnp.int32(ALL_BITS))
        distance = smallest(
            jnp.where(typical, zero, everywhere),
            everywhere,
            lambda c: (kept_mass(c), from_mean(c)),
            lambda total: total >= typical_p * whole,
        )

        def mass_of(c: jax.Array) -> jax.Array:
            return jnp.where(from_mean(c) <= distance, kept_mass(c), 0.0)

        (near_mean,) = totals(lambda c: (mass_of(c),), length, when=typical)
        target = uniform * jnp.where(typical, near_mean, whole)

        def in_descending_order() -> jax.Array:
            """Finds the cost at which the sum passes the target, and among the tokens that have it, the one at which it does."""
            at = smallest(zero, limit, lambda c: (mass_of(c), _bits(c)), lambda total: total > target)
            (before,) = totals(lambda c: (jnp.where(_bits(c) < at, mass_of(c), 0.0),), length)
            each = jnp.exp(-lax.bitcast_convert_type(at, f32))
            passed = jnp.maximum((target - before) / each, 0.0).astype(jnp.int32)

            def following(_: jax.Array, token: jax.Array) -> jax.Array:
                """Returns the next token of this cost; the same one if there is none."""
                found = first(lambda ids, x: (_bits(cost(x)) == at) & (ids > token), length)
                return jnp.where(found < vocab, found, token)

            return lax.fori_loop(0, jnp.minimum(passed, CANDIDATES) + 1, following, jnp.int32(-1))

        def in_order_of_vocabulary() -> jax.Array:
            """Finds the block in which the sum passes the target, then the token; or the last one that has a mass."""

            def look(b: jax.Array, x: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                sum_, block, before = state
                mass = jnp.sum(mass_of(cost(x)))
                here = (mass > 0.0) & (sum_ <= target)
                return sum_ + mass, jnp.where(here, b, block), jnp.where(here, sum_, before)

            _, block, before = walk(look, (none, zero, none), length)
            mass, ids = mass_of(cost(load(block, length))), ids_of(block, length)
            passed = (jnp.cumsum(mass) > target - before) & (mass > 0.0)
            last = jnp.max(jnp.where(mass > 0.0, ids, 0))
            return jnp.minimum(jnp.min(jnp.where(passed, ids, vocab)), last)

        is_few = kept < min(vocab, CANDIDATES)
        out_ref[row] = jnp.clip(lax.cond(is_few, in_descending_order, in_order_of_vocabulary), 0, vocab - 1)


def _bits(x: jax.Array) -> jax.Array:
    """Returns the bits of non-negative floats as int32, which have the same order."""
    return lax.bitcast_convert_type(x, jnp.int32)
