"""How many pages the pool gets when the user does not say."""

from __future__ import annotations

import ctypes
import os
import sys

import jax.numpy as jnp

from llm_infer.config import EngineConfig
from llm_infer.errors import CapacityError
from llm_infer.models.load import LoadedModel

CPU_POOL_BYTES = 1 << 30
CPU_POOL_SHARE = 0.25


def page_dtype(model: LoadedModel, config: EngineConfig) -> jnp.dtype:
    """Type of the keys and values in the pages."""
    return model.dtype if config.cache.dtype is None else jnp.dtype(config.cache.dtype)


def check_pool_fits(model: LoadedModel, config: EngineConfig, num_pages: int) -> None:
    """Raises CapacityError for a pool that is larger than the machine's memory."""
    pool = (
        model.num_shards
        * num_pages
        * config.cache.page_size
        * model.config.kv_bytes_per_token(page_dtype(model, config).itemsize)
    )
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if pool > physical:
        raise CapacityError(
            f"num_pages={num_pages} makes a page pool of {pool / 1e9:.1f} GB, the machine has {physical / 1e9:.1f} GB: "
            "lower num_pages"
        )


def default_num_pages(model: LoadedModel, config: EngineConfig, max_model_len: int) -> int:
    """Pages of a data-parallel shard including the null page.

    The pool of all shards takes `CacheConfig.memory_bytes`, or on the CPU the smaller of 1 GiB and a quarter of the
    machine's memory; never more than all running sequences can fill at full length.

    Raises:
        CapacityError: not even one page fits beside the null page.
    """
    page_size = config.cache.page_size
    page_bytes = page_size * model.config.kv_bytes_per_token(page_dtype(model, config).itemsize)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = config.cache.memory_bytes or min(CPU_POOL_BYTES, int(CPU_POOL_SHARE * physical))
    memory //= model.num_shards
    per_sequence = -(-max_model_len // page_size)
    fits = memory // page_bytes
    if fits < 2:
        raise CapacityError(
            f"the page pool of {memory / 1e6:.1f} MB holds {fits} pages of {page_bytes / 1e6:.2f} MB, at least 2 are "
            "needed: raise kv_cache_memory"
        )
    return int(min(fits, config.scheduler.max_num_seqs * per_sequence + 1))


def release_free_memory() -> None:
    """Gives memory that compilers have freed back to the system; glibc's allocator would keep it (200 MB were seen)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
