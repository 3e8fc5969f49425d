"""What the layers of a model attend over and go on from in a step: pages of the group that each belongs to, and states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from llm_infer.engine.step.state import CONV, PAGES, Cache
from llm_infer.kvcache.groups import PageGroups
from llm_infer.models.decoder import Layer
from pallas_kernels.causal_conv import StateRows, causal_conv
from pallas_kernels.paged_attention import AttentionPlan, copy_pages, paged_attention


@dataclass(frozen=True)
class PagedAttention:
    """What the model attends with, where all layers have the same pages.

    Attributes:
        plan: the step's plan.
        states: where the states of its sequences are; None for models without.
    """

    plan: AttentionPlan
    states: StateRows | None = None

    def __call__(
        self, query: Array, key: Array, value: Array, cache: Cache, layer: Layer, **options: Any
    ) -> tuple[Array, Cache]:
        """Implements `Attend`."""
        out, pages = paged_attention(query, key, value, cache[PAGES], self.plan, layer=layer, **options)
        return out, {**cache, PAGES: pages}

    def causal_conv(self, x: Array, taps: Array, cache: Cache, layer: Layer) -> tuple[Array, Cache]:
        """Convolves a layer's rows, see `pallas_kernels.causal_conv`."""
        assert self.states is not None, "a model with convolutions has states"
        out, states = causal_conv(x, taps, cache[CONV], self.states, layer)
        return out, {**cache, CONV: states}


@dataclass(frozen=True, kw_only=True)
class GroupedAttention(PagedAttention):
    """The same for layers in groups: `plan` is that of no group, but what they have in common.

    Attributes:
        tables, slots: of each group, the block tables and where each token is written.
        group_of, place_of: of each layer, its group and its place in the pages of the group.
    """

    tables: Int[Array, "G S B"]
    slots: Int[Array, "G T"]
    group_of: Int[Array, " L"]
    place_of: Int[Array, " L"]

    def __call__(
        self, query: Array, key: Array, value: Array, cache: Cache, layer: Layer, **options: Any
    ) -> tuple[Array, Cache]:
        """Implements `Attend`."""
        group = self.group_of[layer]
        own = self.plan._replace(block_tables=self.tables[group], write_slot=self.slots[group])
        return PagedAttention(own)(query, key, value, cache, self.place_of[layer], **options)


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
        states: StateRows | None = None,
    ) -> PagedAttention:
        """Makes what the model attends with.

        Args:
            plan: of the first group; but for pages, those of the others are the same.
            more_tables: block tables of the others; None where there are none.
            rows, positions, used: the sequence of each token, its position, and whether it is a token at all.
            states: where the states of the sequences are; None for models without.
        """
        if more_tables is None:
            return PagedAttention(plan, states)
        tables = jnp.concatenate((plan.block_tables[None], more_tables))
        # A sequence past the last stands for padding, which is written to the null page.
        pages = tables.at[:, rows, positions // self.page_size].get(mode="clip")
        slots = jnp.where(used[None], pages * self.page_size + (positions % self.page_size)[None], 0)
        group_of, place_of = (jnp.array(each, jnp.int32) for each in self.groups.places())
        return GroupedAttention(plan, states, tables=tables, slots=slots, group_of=group_of, place_of=place_of)


def copied_pages(cache: Cache, f: Mapping[str, Array]) -> Cache:
    """Copies the shared pages that the step is about to write."""
    return {**cache, PAGES: copy_pages(cache[PAGES], f["copy_from"], f["copy_to"], f["num_copies"][0])}
