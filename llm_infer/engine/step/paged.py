"""What the layers of a model attend over in a step: the pages of the group that each belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from llm_infer.engine.step.state import PAGES, Cache
from llm_infer.kvcache.groups import PageGroups
from llm_infer.models.decoder import Attend, Layer
from pallas_kernels.paged_attention import AttentionPlan, copy_pages, paged_attention


def attention_over(plan: AttentionPlan) -> Attend:
    """Makes what the model attends with, where all layers have the same pages."""

    def attend(
        query: Array, key: Array, value: Array, cache: Cache, layer: Layer, **options: Any
    ) -> tuple[Array, Cache]:
        out, pages = paged_attention(query, key, value, cache[PAGES], plan, layer=layer, **options)
        return out, {**cache, PAGES: pages}

    return attend


@dataclass(frozen=True)
class Paging:
    """The groups of layers with pages of their own, and the tokens in a page."""

    groups: PageGroups
    page_size: int

    def attention_over(
        self,
        plan: AttentionPlan,
        more_tables: Int[Array, "G-1 S B"] | None,
        rows: Int[Array, " T"],
        positions: Int[Array, " T"],
        used: Bool[Array, " T"],
    ) -> Attend:
        """Makes what the model attends with.

        Args:
            plan: of the first group; but for pages, those of the others are the same.
            more_tables: block tables of the others; None where there are none.
            rows, positions, used: the sequence of each token, its position, and whether it is a token at all.
        """
        if more_tables is None:
            return attention_over(plan)
        tables = jnp.concatenate((plan.block_tables[None], more_tables))
        # A sequence past the last stands for padding, which is written to the null page.
        pages = tables.at[:, rows, positions // self.page_size].get(mode="clip")
        slots = jnp.where(used[None], pages * self.page_size + (positions % self.page_size)[None], 0)
        group_of, place_of = (jnp.array(each, jnp.int32) for each in self.groups.places())

        def attend(
            query: Array, key: Array, value: Array, cache: Cache, layer: Layer, **options: Any
        ) -> tuple[Array, Cache]:
            group = group_of[layer]
            own = plan._replace(block_tables=tables[group], write_slot=slots[group])
            return attention_over(own)(query, key, value, cache, place_of[layer], **options)

        return attend


def copied_pages(cache: Cache, f: Mapping[str, Array]) -> Cache:
    """Copies the shared pages that the step is about to write."""
    return {**cache, PAGES: copy_pages(cache[PAGES], f["copy_from"], f["copy_to"], f["num_copies"][0])}
