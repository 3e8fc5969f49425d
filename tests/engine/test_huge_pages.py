"""The page pool in huge pages: still zeros, still updated in place, and given to the system until it is used."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.engine.huge_pages import HUGE, empty_in_huge_pages


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_zeros_are_given_back_and_are_zeros() -> None:
    size = 64 << 20
    array = jax.block_until_ready(jnp.zeros((size // 4,), jnp.float32))
    before = resident()
    done = empty_in_huge_pages(array)
    assert size - 2 * HUGE <= done <= size and done % HUGE == 0
    assert before - resident() > size // 2
    update = jax.jit(lambda x: x.at[7].set(3.0), donate_argnums=0)
    place = array.unsafe_buffer_pointer()
    array = update(array)
    assert array.unsafe_buffer_pointer() == place
    values = np.asarray(array)
    assert values[7] == 3.0 and np.count_nonzero(values) == 1


def test_small_arrays_are_left_alone() -> None:
    array = jnp.zeros((HUGE // 8,), jnp.float32)
    assert empty_in_huge_pages(array) == 0
    assert not np.asarray(array).any()
