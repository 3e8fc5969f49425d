"""The implementations of draw_tokens agree with each other and with the definition of the limits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_ffi
from pallas_kernels.draw_tokens import Limits, draw_tokens, gpu_triton
from pallas_kernels.draw_tokens.cases import make_limits, random_limits, random_logits
from pallas_kernels.draw_tokens.limits import CANDIDATES
from pallas_kernels.draw_tokens.top_tokens import top_tokens
from pallas_kernels.draw_tokens.xla import (
    BLOCK,
    draw_from_all,
    in_row_blocks,
    invert_cdf,
    kept_candidates,
    kept_tokens,
)
from tests.decoding.distribution import distribution

INVERT = jax.jit(invert_cdf)
NATIVE, XLA = (jax.jit(partial(draw_tokens, implementation=name)) for name in ("cpu", "xla"))
TRITON = jax.jit(partial(gpu_triton.draw_tokens, interpret=True))
native = pytest.mark.skipif(cpu_ffi.why_not() is not None, reason=f"native CPU kernels: {cpu_ffi.why_not()}")


@pytest.mark.parametrize("vocab", [1, CANDIDATES, CANDIDATES + 1, 4097])
@pytest.mark.parametrize(
    "implementation", [pytest.param(NATIVE, marks=native, id="native"), pytest.param(TRITON, id="triton")]
)
def test_all_draw_the_same_tokens(implementation: Callable[..., jax.Array], vocab: int) -> None:
    """Up to rounding: a sum in another order can move a threshold by a token, or a draw at the border of two."""
    rng, rows = np.random.default_rng(vocab), 400
    limits, uniform = random_limits(rng, rows, vocab), jnp.asarray(rng.random(rows), jnp.float32).at[:3].set(0.0)
    logits = random_logits(rng, rows, vocab)
    found, expected = (np.asarray(draw(jnp.asarray(logits), limits, uniform)) for draw in (implementation, XLA))
    assert found.dtype == expected.dtype == np.int32
    # Among candidates XLA's order of equal logits is any: the tokens may differ, their logits may not.
    at = np.arange(rows)
    differ = logits[at, found] != logits[at, expected]
    assert differ.mean() <= 0.01, np.flatnonzero(differ)
    tied = np.arange(rows) < rows // 4
    np.testing.assert_array_equal(found[~tied & ~differ], expected[~tied & ~differ])


BY_TABLE = [pytest.param(NATIVE, marks=native, id="cpu"), pytest.param(XLA, id="xla")]


@pytest.fixture(params=[*BY_TABLE, pytest.param(TRITON, id="triton")])
def draw(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    return request.param


@native
def test_both_keep_the_same_typical_tokens_where_all_are_about_as_likely() -> None:
    """Distances from the entropy are then small differences, of which rounding must not decide."""
    rng, rows = np.random.default_rng(3), 400
    logits = jnp.asarray(rng.standard_normal((rows, 300)) / 10, jnp.float32)
    limits = make_limits(rows, temperature=100.0, typical_p=rng.choice([0.05, 0.2, 0.5, 0.9], rows))
    uniform = jnp.asarray(rng.random(rows), jnp.float32)
    differ = np.asarray(NATIVE(logits, limits, uniform)) != np.asarray(XLA(logits, limits, uniform))
    assert differ.mean() <= 0.005


def test_what_cannot_be_drawn_from_gives_some_token(draw: Callable[..., jax.Array]) -> None:
    logits = np.zeros((7, 200), np.float32)
    logits[0], logits[1], logits[2, 7], logits[3, 7], logits[4, 3:] = -np.inf, np.nan, np.nan, np.inf, np.nan
    logits[5, 20:], logits[5, :20] = np.inf, -np.inf
    for top_k, top_p in ((-1, 1.0), (5, 0.5)):
        limits = make_limits(7, top_k=top_k, top_p=top_p, typical_p=0.9 if top_k > 0 else 1.0)
        for uniform in (0.0, 0.999):
            found = np.asarray(draw(jnp.asarray(logits), limits, jnp.full(7, uniform, jnp.float32)))
            assert ((found >= 0) & (found < 200)).all()
            assert found[3] == 7 and found[5] == 20  # infinite logits leave the others no mass


def test_both_zeros_are_one_number(draw: Callable[..., jax.Array]) -> None:
    logits = np.full((8, 300), -1.0, np.float32)
    logits[:, [5, 90]] = -0.0, 0.0
    limits = make_limits(8, temperature=[0.0] + [1.0] * 7, top_k=1, top_p=0.9)
    found = np.asarray(draw(jnp.asarray(logits), limits, jnp.linspace(0.0, 0.95, 8)))
    assert found[0] == 5 and set(found.tolist()) == {5, 90}
    logits[:, 5:205:2], logits[:, 6:206:2] = -0.0, 0.0  # more than the candidates
    found = np.asarray(draw(jnp.asarray(logits), limits, jnp.linspace(0.0, 0.99, 8)))
    assert found[0] == 5
    np.testing.assert_array_equal(found[1:], 5 + (np.linspace(0.0, 0.99, 8)[1:] * 200).astype(int))


def test_a_low_temperature_keeps_small_differences(draw: Callable[..., jax.Array]) -> None:
    """1000 / 0.001 has no more than 16 steps per unit in float32; the difference is divided, not the logits."""
    logits = jnp.asarray([[1000.0, 1000.0 - 2.0**-10]] * 2, jnp.float32)
    first = 1 / (1 + np.exp(-(2.0**-10) / 0.001))
    uniform = jnp.asarray([first - 0.001, first + 0.001], jnp.float32)
    np.testing.assert_array_equal(draw(logits, make_limits(2, temperature=0.001), uniform), [0, 1])


def test_no_token_without_mass_is_drawn_where_sums_round() -> None:
    """A cumulative sum that is computed in a tree can grow by rounding over blocks that add nothing."""
    rng, rows, blocks = np.random.default_rng(0), 64, 384
    mass = rng.exponential(size=(rows, blocks, BLOCK)).astype(np.float32)
    mass[rng.random((rows, blocks)) < 0.7] = 0.0
    ends = np.asarray(jax.jit(lambda x: jnp.cumsum(jnp.sum(x, axis=-1), axis=-1))(mass))
    for shift in range(0, blocks, 8):
        grown = (mass[:, shift].max(-1) == 0) & (shift > 0)
        aim = np.where(grown, ends[:, shift - 1] / ends[:, -1], rng.random(rows)).astype(np.float32)
        for uniform in (aim, np.nextafter(aim, np.float32(1)), np.nextafter(aim, np.float32(0))):
            found = np.asarray(INVERT(mass.reshape(rows, -1), np.clip(uniform, 0, 0.9999999).astype(np.float32)))
            assert (mass.reshape(rows, -1)[np.arange(rows), found] > 0).all()


@pytest.mark.parametrize("draw", BY_TABLE)
def test_limits_of_other_dtypes_are_taken(draw: Callable[..., jax.Array]) -> None:
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 300)), jnp.float32)
    limits = make_limits(4, temperature=0.5, top_p=0.75, top_k=100, min_p=0.0625)
    other = Limits(*(x.astype(jnp.int16 if x.dtype == jnp.int32 else jnp.bfloat16) for x in limits))
    uniform = jnp.linspace(0.0, 0.75, 4)
    np.testing.assert_array_equal(draw(logits, other, uniform), draw(logits, limits, uniform))


@native
def test_no_memory_beyond_the_row_is_read() -> None:
    """Rows are neighbours in memory: one that is not a whole number of vectors must not take from the next."""
    vocab = 131
    logits = np.full((8, vocab), -1.0, np.float32)
    logits[1::2] = 50.0
    found = np.asarray(NATIVE(jnp.asarray(logits), make_limits(8), jnp.full(8, 0.9999999, jnp.float32)))
    np.testing.assert_array_equal(found, vocab - 1)


def test_kept_sets_equal_those_of_a_sort() -> None:
    rng, rows, vocab = np.random.default_rng(2), 2048, 300
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    logits -= logits.max(-1, keepdims=True)
    for rules in ((1.0, 0.85, 40, 0.0, 1.0), (1.0, 0.9, -1, 0.02, 0.6)):
        limits = make_limits(
            rows, **dict(zip(("temperature", "top_p", "top_k", "min_p", "typical_p"), rules, strict=True))
        )
        kept = np.asarray(jax.jit(kept_tokens)(jnp.asarray(logits), limits))
        values, ids = top_tokens(jnp.asarray(logits), CANDIDATES)
        among, enough = jax.jit(kept_candidates)(values, jnp.sum(jnp.exp(jnp.asarray(logits)), axis=-1), limits)
        assert enough.mean() > 0.95
        for row in range(0, rows, 16):
            expected = distribution(logits[row], *rules) > 0
            np.testing.assert_array_equal(kept[row], expected)
            if not enough[row]:
                continue
            assert set(np.asarray(ids)[row][np.asarray(among)[row]]) == set(np.flatnonzero(expected))


@pytest.mark.parametrize("count", [24, 11, 10])
def test_rows_draw_the_same_a_few_at_a_time(count: int) -> None:
    logits = jnp.asarray(np.random.default_rng(6).standard_normal((count, 300)).astype(np.float32))
    limits = make_limits(count, top_p=0.97, top_k=np.arange(count) % 100, min_p=0.01, typical_p=0.95)
    uniform = jnp.linspace(0, 0.99, count)
    whole, blocks = jax.jit(draw_from_all)(logits, limits, uniform), jax.jit(in_row_blocks)(logits, limits, uniform)
    np.testing.assert_array_equal(np.asarray(blocks), np.asarray(whole))
    assert len(set(whole.tolist())) > count // 2


def test_wrong_arguments_are_refused_by_name() -> None:
    limits, uniform, logits = make_limits(3), jnp.zeros(3), jnp.zeros((3, 50))
    with pytest.raises(ValueError, match=r"logits: expected floats of shape \[S, V\], found int32"):
        draw_tokens(logits.astype(jnp.int32), limits, uniform)
    with pytest.raises(ValueError, match=r"top_k: expected integers of shape \[S=3\], found float32"):
        draw_tokens(logits, limits._replace(top_k=uniform), uniform)
    with pytest.raises(ValueError, match=r"uniform: expected floats of shape \[S=3\], found float32 of shape \[2\]"):
        draw_tokens(logits, limits, uniform[:2])
