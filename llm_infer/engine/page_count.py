"""How many pages the pool gets: as asked for, or as many as fit a device beside what the compiled program takes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_infer.base.errors import CapacityError
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.engine.memory import device_bytes, is_out_of_memory, local_bytes, memory_limit, physical_memory
from llm_infer.engine.programs import StepPrograms
from llm_infer.engine.step.state import PAGES

UTILIZATION = 0.9
"""Share of an accelerator's memory that weights, pages and steps may take where nothing is said."""


CPU_POOL_BYTES = 1 << 30
CPU_POOL_SHARE = 0.25

LARGEST = (
    StepFeatures.LOGPROBS
    | StepFeatures.TOP_LOGPROBS
    | StepFeatures.PENALTIES
    | StepFeatures.MASKED
    | StepFeatures.PROMPT_LOGPROBS
    | StepFeatures.POOLED
    | StepFeatures.BEAMS
)
"""Features of the program that takes the most memory."""


def choose_num_pages(
    steps: StepPrograms, largest_bucket: int, limit: int | None = None, beside: StepPrograms | None = None
) -> int:
    """Chooses the number of pages of a data-parallel shard, the null page included.

    `CacheConfig.num_pages`, or what fits `CacheConfig.memory_bytes`, or what the compiler says fits the devices; without
    any of these on CPUs, what fits the smaller of 1 GiB and a quarter of the machine's memory. Never more than all
    running sequences can fill at full length, but for an explicit number.

    Args:
        steps: the programs.
        largest_bucket: tokens of the largest.
        limit: bytes of each device; None asks the devices.
        beside: those of a draft model, which has as many pages of its own.

    Raises:
        CapacityError: not even one page fits beside the null page, or the pool is larger than the machine's memory.
    """
    cache, sharding = steps.engine.cache, steps.sharding
    max_pages = steps.most_pages
    if cache.num_pages is not None:
        pages = cache.num_pages
    elif cache.memory_bytes is not None:
        pages = pages_in(steps, cache.memory_bytes, max_pages)
    elif sharding.platform == "cpu" and cache.memory_utilization is None and limit is None:
        pages = pages_in(steps, min(CPU_POOL_BYTES, int(CPU_POOL_SHARE * physical_memory())), max_pages)
    else:
        features = LARGEST | (PLAIN if steps.engine.speculative is None else StepFeatures.DRAFTS)

        weights, one_page = local_bytes(dict(steps.params)), page_bytes(steps)
        draft_weights, draft_page = (0, 0) if beside is None else (local_bytes(dict(beside.params)), page_bytes(beside))

        def measure(num_pages: int) -> int | None:
            try:
                taken = device_bytes(steps.lower(largest_bucket, features, num_pages).compile())
                return taken + draft_weights + num_pages * draft_page
            except jax.errors.JaxRuntimeError as error:
                if is_out_of_memory(error):
                    return None
                raise

        pages = pages_that_fit(
            measure,
            limit=memory_limit(sharding.devices) if limit is None else limit,
            utilization=UTILIZATION if cache.memory_utilization is None else cache.memory_utilization,
            weights=weights + draft_weights,
            page_bytes=one_page + draft_page,
            max_pages=max_pages,
        )
    if cache.num_pages is None and jax.process_count() > 1:  # hosts may differ in memory, not in pages
        pages = int(multihost_utils.process_allgather(np.int32(pages)).min())
    whole = (pages * page_bytes(steps) + local_bytes(steps.states())) * len(sharding.devices) // jax.process_count()
    if sharding.platform == "cpu" and whole > physical_memory():
        raise CapacityError(
            f"num_pages={pages} makes pools of {whole / 1e9:.1f} GB, the machine has "
            f"{physical_memory() / 1e9:.1f} GB: lower num_pages"
        )
    return pages


def page_bytes(steps: StepPrograms) -> int:
    """Counts the bytes of a page on each device."""
    return local_bytes(steps.cache(2)[PAGES]) // 2


def pages_in(steps: StepPrograms, memory: int, max_pages: int) -> int:
    """Counts the pages of a shard when the pools of all devices together take `memory` bytes; at most `max_pages`.

    Raises:
        CapacityError: not even one page fits beside the null page.
    """
    share = memory // len(steps.sharding.devices)
    fits = share // page_bytes(steps)
    if fits < 2:
        raise CapacityError(
            f"the page pool of {share / 1e6:.1f} MB holds {fits} pages of {page_bytes(steps) / 1e6:.2f} MB, at least 2 "
            "are needed: raise kv_cache_memory"
        )
    return min(fits, max_pages)


def pages_that_fit(
    measure: Callable[[int], int | None],
    *,
    limit: int,
    utilization: float,
    weights: int,
    page_bytes: int,
    max_pages: int,
) -> int:
    """Returns the largest number of pages with which the largest program stays within `limit` × `utilization`.

    What a program takes besides weights and pages is known once it is compiled, so one is: with as many pages as the
    weights leave room for, and then as many fewer as it is over. Where a program copies some pages, each page taken
    away frees more than its own size, so the result is still within.

    Args:
        measure: bytes on a device of the program with this number of pages; None where the compiler refuses it.
        limit: bytes of a device.
        utilization: share of them that may be used.
        weights: bytes of the parameters on a device.
        page_bytes: of one page on a device.
        max_pages: pages that are of any use.

    Raises:
        CapacityError: fewer than two pages fit (page 0 is never used by a sequence).
    """
    budget = int(limit * utilization)
    above = pages = min(max_pages, (budget - weights) // page_bytes)
    taken = None
    while pages >= 2 and (taken := measure(pages)) is None:
        above, pages = pages - 1, pages // 2
    if taken is not None:
        spare = budget - taken
        if spare < 0:
            pages += spare // page_bytes  # rounds down: away from zero
        else:  # what else grows with the pages grows with them at most in proportion
            grows = page_bytes + max(0, taken - weights - pages * page_bytes) // pages
            pages = min(above, pages + spare // grows)
    if pages < 2:
        beside = "" if taken is None else f", the largest step takes {taken / 1e9:.2f} GB with them"
        raise CapacityError(
            f"memory_utilization={utilization} of {limit / 1e9:.2f} GB is {budget / 1e9:.2f} GB per device; the weights "
            f"take {weights / 1e9:.2f} GB{beside}, which leaves {max(0, pages)} pages of {page_bytes / 1e6:.2f} MB and at "
            "least 2 are needed: raise memory_utilization or tensor_parallel_size, or lower max_num_batched_tokens or "
            "max_num_seqs"
        )
    return pages
