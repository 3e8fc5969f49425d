"""Step programs from descriptions of their arguments: nothing needs to exist, nor the device that they are lowered for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llm_infer.config import EngineConfig
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.penalties import PenaltyState, empty_penalties
from llm_infer.decoding.token_rules import mask_words
from llm_infer.engine.memory import page_dtype
from llm_infer.engine.platform import compiler_options, layer_loop, query_rows
from llm_infer.engine.step.layout import StepLayout
from llm_infer.engine.step.multi_step import make_steps
from llm_infer.engine.step.paged import Paging
from llm_infer.engine.step.sharding import StepSharding
from llm_infer.engine.step.state import PAGES, StepInputs, StepState
from llm_infer.engine.step.step import make_step
from llm_infer.kvcache.groups import PageGroups, group_layers, one_group, pages_at_most
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel
from llm_infer.scheduler.limits import tokens_ahead
from llm_infer.scheduler.strategies.speculative import MAX_DRAFTS
from pallas_kernels.numerics import numerics
from pallas_kernels.paged_attention.plan import PlanShape

SNAPSHOT_BYTES = 256 << 20
"""Memory of the snapshots of states, where their number is not given …"""
MOST_SNAPSHOTS = 4096
"""… and their number at most."""


@dataclass(frozen=True)
class StepPrograms:
    """What all step programs of an engine have in common.

    Attributes:
        definition, config: of the model, as it is cut over the devices.
        params: `ShapeDtypeStruct`s of the parameters with their shardings; the arrays may change.
        engine: limits and cache settings.
        sharding: the devices.
        page_dtype: of keys and values in the pages.
        max_model_len: longest sequence in tokens.
        smallest_batch: rows that a step has at least.
    """

    definition: Any
    config: ModelConfig
    params: Mapping[str, Any]
    engine: EngineConfig
    sharding: StepSharding
    page_dtype: jnp.dtype
    max_model_len: int
    smallest_batch: int

    @classmethod
    def of(cls, model: LoadedModel, engine: EngineConfig, max_model_len: int) -> StepPrograms:
        """Makes those of a loaded model."""
        sharding = StepSharding.of(model.config, model.mesh)
        return cls(
            model.definition,
            model.config,
            jax.tree.map(described, dict(model.params)),
            engine,
            sharding,
            page_dtype(model, engine, sharding.platform),
            max_model_len,
            model.smallest_batch,
        )

    @property
    def pages_per_seq(self) -> int:
        """B, length of a block table."""
        return -(-self.max_model_len // self.engine.cache.page_size)

    @property
    def groups(self) -> PageGroups:
        """The groups of layers that share pages."""
        if self.engine.cache.disable_hybrid_kv_cache_manager:
            return one_group(self.config.num_attending)
        ahead = tokens_ahead(self.engine.scheduler)
        return group_layers(self.config.windows, self.config.num_attending, self.max_model_len, ahead)

    @property
    def most_pages(self) -> int:
        """Pages that all running sequences take at full length, the null page included."""
        scheduler = self.engine.scheduler
        sizes = self.max_model_len, self.engine.cache.page_size, tokens_ahead(scheduler)
        return scheduler.max_num_seqs * pages_at_most(self.groups.windows, *sizes) + 1

    @property
    def num_states(self) -> int:
        """Pages for states of each data-parallel shard: two for each running sequence, the null page, and snapshots."""
        if not self.config.recurrent:
            return 0
        cache, running = self.engine.cache, 2 * self.engine.scheduler.max_num_seqs + 1
        if not cache.enable_prefix_caching:
            return running
        if cache.num_state_snapshots is not None:
            return running + cache.num_state_snapshots
        one = self.config.state_bytes(self.state_dtype.itemsize)
        return running + min(SNAPSHOT_BYTES // one, MOST_SNAPSHOTS)

    @property
    def state_dtype(self) -> jnp.dtype:
        """The type of states: that of activations."""
        return jnp.dtype(self.params["final_norm.weight"].dtype)

    @property
    def query_rows(self) -> int:
        """Most query rows of one work item of a prefill."""
        return query_rows(self.sharding.platform, self.config.group_size)

    def layout(self, bucket: int, features: StepFeatures = PLAIN) -> StepLayout:
        """Lays out the step buffer of a token bucket: all sizes follow from the bucket and the configured maxima."""
        scheduler, groups, states = self.engine.scheduler, len(self.groups.windows), self.config.recurrent
        sequences = min(bucket, max(self.smallest_batch, scheduler.max_num_seqs))
        if StepFeatures.STEPS in features:  # a token of each sequence
            shape = PlanShape(sequences, sequences, self.pages_per_seq, min(self.query_rows, sequences))
            return StepLayout(shape, sequences, scheduler.num_scheduler_steps, groups, states)
        draws = min(bucket, sequences + MAX_DRAFTS) if StepFeatures.DRAFTS in features else sequences
        shape = PlanShape(bucket, sequences, self.pages_per_seq, min(self.query_rows, bucket))
        return StepLayout(shape, draws, groups=groups, states=states)

    def cache(self, num_pages: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Describes the pools: `num_pages` of each data-parallel shard, and those of states."""
        sizes = num_pages, self.engine.cache.page_size, self.groups.depth
        return {PAGES: self.sharding.pool(*sizes, self.page_dtype)} | self.states()

    def states(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Describes the pools of states; none for models without."""
        return self.sharding.states(self.num_states, self.state_dtype) if self.num_states else {}

    def penalties(self) -> PenaltyState:
        """Describes what steps with PENALTIES keep of each slot."""
        slots = (self.engine.scheduler.max_num_seqs + 1) * self.sharding.num_shards
        arrays = jax.eval_shape(partial(empty_penalties, slots, self.config.vocab_size))
        return jax.tree.map(lambda x: self.sharding.struct(x.shape, x.dtype), arrays)

    def state(self, features: StepFeatures, num_pages: int) -> StepState:
        """Describes what a program with these features keeps on the devices."""
        slots = self.engine.scheduler.max_num_seqs + 1
        last_ids = self.sharding.struct((self.sharding.num_shards, slots), jnp.int32)
        penalties = self.penalties() if StepFeatures.PENALTIES in features else None
        return StepState._make((self.cache(num_pages), last_ids, penalties))

    def inputs(self, bucket: int, features: StepFeatures) -> StepInputs:
        """Describes what the host sends with a step of a token bucket."""
        layout, shards = self.layout(bucket, features), self.sharding.num_shards
        masks = (shards, layout.num_draws, mask_words(self.config.vocab_size))
        allowed = self.sharding.struct(masks, jnp.int32) if StepFeatures.MASKED in features else None
        return StepInputs._make((self.sharding.struct((shards, layout.size), jnp.int32), allowed))

    def lower(
        self, bucket: int, features: StepFeatures, num_pages: int, *, keep_logits: bool = False
    ) -> jax.stages.Lowered:
        """Lowers the step of a token bucket with these features for the devices of `sharding`."""
        layout, sharding = self.layout(bucket, features), self.sharding
        paging = Paging(self.groups, self.engine.cache.page_size)
        how: dict[str, Any] = {"loop": layer_loop(sharding.platform), "logprobs_mode": self.engine.logprobs_mode}
        if StepFeatures.STEPS in features:
            alone = sharding.num_shards == 1
            step = make_steps(self.definition, layout, features, paging, ends_early=alone, **how)
        else:
            step = make_step(self.definition, layout, features, paging, keep_logits=keep_logits, **how)
        params = dict(self.params)
        state, inputs = self.state(features, num_pages), self.inputs(bucket, features)
        options = compiler_options(sharding.platform, params, self.engine.numerics)
        with numerics(self.engine.numerics if sharding.platform == "gpu" else "auto"):
            return sharding.jit(step, params, state, inputs, options).lower(params, state, inputs)


def described(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Describes an array: shape, type and place on a mesh."""
    placed = isinstance(array.sharding, jax.sharding.NamedSharding)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding if placed else None)
