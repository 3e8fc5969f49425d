"""draw_tokens on a GPU through Pallas' Triton lowering: a thread block draws for a row. The host would wait for XLA's loops.

As on CPUs (`cpu_kernel`): a token's cost is how far its logit, divided by the temperature, is below the largest, and thresholds
of the cost are found by bisection over the bits of floats, which skips blocks of tokens that cost too much.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Case
from pallas_kernels.draw_tokens.limits import ALL_BITS, CANDIDATES, FINITE, SMALLEST, WEIGHTLESS, Limits
from pallas_kernels.gpu_devices import why_not_capability

BLOCK = 4096
"""Tokens at which a thread block looks together."""
Of = Callable[[jax.Array], jax.Array]


def why_not(case: Case) -> str | None:
    """Refuses all but NVIDIA GPUs from Ampere on."""
    return why_not_capability(case.device_kind, (8, 0), "for Triton")


def draw_tokens(logits: jax.Array, limits: Limits, uniform: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Draws on a GPU, see `pallas_kernels.draw_tokens.draw_tokens`; `interpret` runs the kernel in Pallas' interpreter."""
    arguments = (limits.temperature, limits.top_p, limits.highest_cost(), limits.typical_p, uniform)
    return pl.pallas_call(
        _kernel,
        grid=(logits.shape[0],),
        out_shape=jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="draw_tokens",
    )(logits.astype(jnp.float32), jnp.stack(arguments, axis=1), limits.top_k)


def _kernel(logits_ref, limits_ref, top_k_ref, out_ref) -> None:
    row, vocab = pl.program_id(0), logits_ref.shape[1]
    num_blocks = pl.cdiv(vocab, BLOCK)
    temperature, top_p, highest, typical_p, uniform = (limits_ref[row, i] for i in range(5))
    top_k = top_k_ref[row]
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    block_number = jnp.arange(pl.next_power_of_2(num_blocks), dtype=jnp.int32)
    f32, none = jnp.float32, jnp.float32(0.0)

    def load(b: jax.Array) -> jax.Array:
        """Loads the logits of a block; -inf behind the vocabulary, and for NaN."""
        at = b * BLOCK + place
        x = plgpu.load(logits_ref.at[row, at], mask=at < vocab, other=-jnp.inf)
        return jnp.where(x == x, x, -jnp.inf)

    def largest_of(b: jax.Array, found: jax.Array) -> jax.Array:
        return jnp.where(block_number == b, jnp.max(load(b)), found)

    largest_of_block = lax.fori_loop(0, num_blocks, largest_of, jnp.full(block_number.shape, -jnp.inf, f32))
    largest = jnp.max(largest_of_block)
    most_likely = _first(block_number, largest_of_block == largest)
    greedy = most_likely * BLOCK + _first(place, load(most_likely) == largest)
    out_ref[row] = jnp.minimum(greedy, vocab - 1)

    @pl.when((temperature >= SMALLEST) & (largest > -jnp.inf) & (largest < jnp.inf))
    def _sampled() -> None:
        coldness = 1.0 / temperature

        def cost(x: jax.Array) -> jax.Array:
            # Its bits are the same wherever it is computed: a difference of quotients could be contracted into one operation.
            return jnp.abs((largest - x) * coldness)  # -0 has other bits than 0

        lowest = _bits(cost(largest_of_block))

        def total(within: jax.Array, of: Of, enough: jax.Array | float = jnp.inf) -> jax.Array:
            """Returns the sum of a function of the cost over blocks with a token up to `within`; may end when it is enough."""

            def more(state: tuple[jax.Array, jax.Array]) -> jax.Array:
                return (state[0] < num_blocks) & (state[1] < enough)

            def add(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                b, sum_ = state
                seen = _at(block_number, lowest, b) <= within
                return b + 1, sum_ + lax.cond(seen, lambda: jnp.sum(of(cost(load(b)))), lambda: none)

            return lax.while_loop(more, add, (jnp.int32(0), none))[1]

        def count_to(bound: jax.Array) -> Of:
            return lambda c: jnp.where(_bits(c) <= bound, 1.0, 0.0)

        def mass_to(bound: jax.Array) -> Of:
            return lambda c: jnp.where(_bits(c) <= bound, jnp.exp(-c), 0.0)

        # A search from `low` to `low` takes no step: thus a limit is left out.
        limit, zero = jnp.int32(FINITE), jnp.int32(0)
        limited, wanted = (top_k > 0) & (top_k < vocab), top_k.astype(f32)
        limit = _smallest(
            jnp.where(limited, zero, limit), limit, lambda bound: total(bound, count_to(bound), wanted) >= wanted
        )
        by_mass = top_p < 1.0
        share = top_p * total(jnp.where(by_mass, limit, jnp.int32(-1)), mass_to(limit))
        most = jnp.minimum(limit, jnp.where(by_mass, jnp.int32(WEIGHTLESS), jnp.int32(FINITE)))
        limit = _smallest(
            jnp.where(by_mass, zero, most), most, lambda bound: total(bound, mass_to(bound), share) >= share
        )
        limit = jnp.minimum(limit, _bits(highest))
        few = jnp.float32(min(vocab, CANDIDATES))
        is_few = total(limit, count_to(limit), few) < few

        # A token's information is its cost plus a number that is the same for all: it is as far from the entropy as its cost is
        # from the mean cost (locally typical sampling, Meister et al., 2023).
        typical, kept_mass = typical_p < 1.0, mass_to(limit)

        def weighted(c: jax.Array) -> jax.Array:
            return jnp.where(kept_mass(c) > 0.0, kept_mass(c) * c, 0.0)

        within = jnp.where(typical, limit, jnp.int32(-1))
        whole = total(within, kept_mass)
        mean = jnp.where(typical, total(within, weighted) / whole, 0.0)

        def near(bound: jax.Array) -> jax.Array:
            furthest = _bits((mean + lax.bitcast_convert_type(bound, f32)) * 1.00001)  # plus what rounding may add
            mass = total(
                jnp.minimum(limit, furthest),
                lambda c: jnp.where(_bits(jnp.abs(c - mean)) <= bound, kept_mass(c), 0.0),
                typical_p * whole,
            )
            return mass >= typical_p * whole

        everywhere = jnp.where(typical, jnp.int32(WEIGHTLESS), jnp.int32(ALL_BITS))
        distance = _smallest(jnp.where(typical, zero, everywhere), everywhere, near)

        def mass_of(c: jax.Array) -> jax.Array:
            return jnp.where(_bits(jnp.abs(c - mean)) <= distance, kept_mass(c), 0.0)

        target = uniform * total(limit, mass_of)

        def in_descending_order() -> jax.Array:
            """Finds the cost at which the sum passes the target, and among the tokens that have it, the one at which it does."""

            def up_to(bound: jax.Array) -> Of:
                return lambda c: jnp.where(_bits(c) <= bound, mass_of(c), 0.0)

            at = _smallest(zero, limit, lambda bound: total(bound, up_to(bound)) > target)
            before = total(at - 1, up_to(at - 1))
            each = jnp.exp(-lax.bitcast_convert_type(at, f32))
            passed = jnp.maximum((target - before) / each, 0.0).astype(jnp.int32)

            def following(_: jax.Array, token: jax.Array) -> jax.Array:
                """Returns the next token of this cost; the same one if there is none."""

                def look(b: jax.Array, found: jax.Array) -> jax.Array:
                    ids = b * BLOCK + place
                    here = (_bits(cost(load(b))) == at) & (ids > token)
                    return jnp.minimum(found, jnp.min(jnp.where(here, ids, vocab)))

                found = lax.fori_loop(0, num_blocks, look, jnp.int32(vocab))
                return jnp.where(found < vocab, found, token)

            return lax.fori_loop(0, jnp.minimum(passed, CANDIDATES) + 1, following, jnp.int32(-1))

        def in_order_of_vocabulary() -> jax.Array:
            """Finds the block in which the sum passes the target, then the token; or the last one that has a mass."""

            def look(b: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
                sum_, block, before = state
                seen = _at(block_number, lowest, b) <= limit
                mass = lax.cond(seen, lambda: jnp.sum(mass_of(cost(load(b)))), lambda: none)
                here = (mass > 0.0) & (sum_ <= target)
                return sum_ + mass, jnp.where(here, b, block), jnp.where(here, sum_, before)

            _, block, before = lax.fori_loop(0, num_blocks, look, (none, zero, none))
            mass = mass_of(cost(load(block)))
            passed = (jnp.cumsum(mass) > target - before) & (mass > 0.0)
            last = jnp.max(jnp.where(mass > 0.0, place, 0))
            return block * BLOCK + jnp.minimum(jnp.min(jnp.where(passed, place, BLOCK)), last)

        out_ref[row] = jnp.clip(lax.cond(is_few, in_descending_order, in_order_of_vocabulary), 0, vocab - 1)


def _bits(x: jax.Array) -> jax.Array:
    """Returns the bits of non-negative floats as int32, which have the same order."""
    return lax.bitcast_convert_type(x, jnp.int32)


def _at(numbers: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the value at an index; `numbers` count from 0."""
    return jnp.sum(jnp.where(numbers == index, values, 0))


def _first(numbers: jax.Array, holds: jax.Array) -> jax.Array:
    """Returns the first number at which something holds; 0 if it never does."""
    found = jnp.min(jnp.where(holds, numbers, numbers.shape[0]))
    return jnp.where(found < numbers.shape[0], found, 0)


def _smallest(low: jax.Array, most: jax.Array, reached: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the smallest int32 from `low` on at which `reached` is true; it is at `most`, and stays so once it is."""

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + lax.shift_right_logical(high - low, jnp.int32(1))
        yes = reached(middle)
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    return lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, most))[1]
