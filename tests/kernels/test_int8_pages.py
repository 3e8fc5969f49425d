"""int8 pages with a scale for each token and head: what is stored, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import cpu_ffi
from pallas_kernels.dispatch import Case
from pallas_kernels.paged_attention import cpu, gpu_triton, paged_attention
from pallas_kernels.paged_attention.cases import CASES, build
from pallas_kernels.paged_attention.pages import from_page_dtype, to_page_dtype, turn_keys, why_not_any_layout

HAS_NATIVE = cpu_ffi.why_not() is None
IMPLEMENTATIONS = ["reference", "xla", *(["cpu"] if HAS_NATIVE else [])]
FACTORS = (1.0, 0.0, 1e-37, 1e-39, 1e-42, 1e30)
"""Of rows; with the third, scales are subnormal, and with the fourth and fifth, numbers are, too."""
TINY = 127 * 1.2e-38
"""Rows of no greater number count as zero."""


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=64))
def test_an_error_is_at_most_half_a_step(row):
    x = jnp.asarray(row, jnp.float32)
    stored = to_page_dtype(x, None, np.uint8)
    assert stored.dtype == np.uint8 and stored.shape == (len(row) + 4,)
    found = from_page_dtype(stored)
    assert jnp.isfinite(found).all() and jnp.abs(found - x).max() <= jnp.abs(x).max() / 127 * 0.51 + TINY


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_any_magnitude_are_stored(implementation):
    """Zeros stay zeros, and no number leaves ±127."""
    case = CASES["own_scales"]
    inputs = build(case)
    k_new = inputs.k_new.copy()
    k_new[: len(FACTORS)] *= np.array(FACTORS, np.float32).astype(k_new.dtype)[:, None, None]
    pages = turn_keys(inputs.pages) if implementation == "cpu" else inputs.pages
    attend = jax.jit(paged_attention, static_argnames=("scale", "implementation"))
    out, pages = attend(
        *(inputs.q, k_new, inputs.v_new, pages, inputs.plan),
        **inputs.arrays,
        scale=inputs.scale,
        implementation=implementation,
    )
    pages = turn_keys(np.asarray(pages), back=True) if implementation == "cpu" else np.asarray(pages)
    page, offset = np.divmod(inputs.plan.write_slot[: len(FACTORS)], case.sizes.page_size)
    stored = pages[1, page, 0, :, offset]
    numbers = stored[..., :-4].view(np.int8).astype(int)
    assert np.isfinite(np.asarray(out[: len(FACTORS)], np.float32)).all() and abs(numbers).max() == 127
    assert numbers.min() == -127 and (numbers[1] == 0).all()
    for row, factor in enumerate(FACTORS):
        wanted = k_new[row].astype(np.float32)
        error = np.abs(np.asarray(from_page_dtype(jnp.asarray(stored[row]))) - wanted).max()
        assert error <= np.abs(wanted).max() * 0.51 / 127 + TINY, factor


def case_of(dtype: str, width: int) -> Case:
    shapes = {"q": (4, 6, 64), "k_new": (4, 3, 64), "pages": (1, 2, 2, 3, 16, width)}
    return Case("cpu", "cpu", shapes, {"pages": dtype, "q": "float32"}, {"kv_scales": False})


def test_refusals_name_the_width_that_is_taken():
    for why_not in (why_not_any_layout, *([cpu.why_not] if HAS_NATIVE else [])):
        assert why_not(case_of("uint8", 68)) is None and why_not(case_of("int8", 64)) is None
        assert "C, D=64 + 4]" in (why_not(case_of("uint8", 64)) or "")
        assert "C, D=64]" in (why_not(case_of("int8", 68)) or "")
    assert "uint8 is for the CPU" in (gpu_triton.why_not(case_of("uint8", 68)) or "")


def test_scales_from_outside_are_refused():
    inputs = build(CASES["own_scales"])
    arguments = (inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan)
    with pytest.raises(ValueError, match=r"v_scale is 0\.5, expected None: these pages have a scale for each token"):
        paged_attention(*arguments, layer=1, scale=0.125, v_scale=0.5)
