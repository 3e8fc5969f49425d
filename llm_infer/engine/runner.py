"""Turns a step's plan into device work: fills the step buffer, keeps pages and last ids on the device, runs the program."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.config import EngineConfig
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.penalties import seen_counts, set_slot
from llm_infer.decoding.token_rules import ALL, mask_words
from llm_infer.engine.huge_pages import empty_in_huge_pages
from llm_infer.engine.memory import out_of_memory_names_the_setting
from llm_infer.engine.page_count import choose_num_pages
from llm_infer.engine.programs import StepPrograms
from llm_infer.engine.slots import SlotTable
from llm_infer.engine.step.features import for_steps, serves
from llm_infer.engine.step.layout import StepLayout, token_buckets
from llm_infer.engine.step.row_fields import ROW_FIELDS
from llm_infer.engine.step.state import StepInputs, StepState, after
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import refuse_deleted, without_values
from llm_infer.parallel.channel import Leader
from llm_infer.parallel.distributed import Channel
from llm_infer.scheduler.plan import ScheduledRow, StepPlan
from llm_infer.scheduler.request import Sequence
from pallas_kernels.paged_attention.plan import fill_plan


@dataclass(frozen=True, slots=True)
class StepProgram:
    """A compiled step.

    Attributes:
        layout: of its buffer.
        features: what it can do.
        state, inputs: descriptions of what it takes; None for fields that it has no use for.
        run: `(params, state, inputs) -> (state, outputs)`.
        set_slot: with PENALTIES, sets the state of a slot.
    """

    layout: StepLayout
    features: StepFeatures
    state: StepState
    inputs: StepInputs
    run: jax.stages.Compiled
    set_slot: Callable | None


@dataclass(slots=True)
class PendingStep:
    """A step that the device may still be running. `outputs` are device arrays; `read` waits for them.

    `dead` are sequences that no token may follow, and why: what the step draws for them is not to be used.
    """

    plan: StepPlan
    outputs: dict[str, jax.Array]
    dead: dict[Sequence, str]

    def read(self) -> dict[str, np.ndarray]:
        """Waits for the outputs: `ids` [dp, S], row i belonging to `plan.rows[shard][i]`; of several steps [dp, K, S]."""
        return {name: np.asarray(value) for name, value in self.outputs.items()}


@dataclass(slots=True)
class RunnerTimes:
    """Seconds of host work, summed over steps, and how often a program was compiled."""

    prepare: float = 0.0
    dispatch: float = 0.0
    compiles: int = 0
    compiles_after_warmup: int = 0


StateRow = tuple[int, np.ndarray, np.ndarray]
"""Row of the per-slot state (over all shards), and what it gets: counts [V] of seen tokens and biases [V]."""


class Runner:
    """Owns the device side of an engine: parameters, page pool, the last drawn id of each slot, and the step programs.

    A program exists per token bucket and set of features; each is compiled ahead of time and called as a compiled program,
    so a call can never recompile: arguments that do not fit are an error instead. A step runs the compiled program with
    the fewest features that has all those its rows need.

    Attributes:
        is_warm: all programs are there; a further compilation is counted in `times.compiles_after_warmup`.

    Args:
        model: definition, parameters and configuration of the model.
        config: limits and cache settings.
        max_model_len: longest sequence in tokens.
        num_pages: pages of each data-parallel shard, including the null page; None chooses (`choose_num_pages`).
        device_memory: bytes of each device; None asks the devices.
        draft_model: has as many pages of its own, which a chosen number leaves room for.
        channel: connects the processes of several hosts; the first tells the others what to run.
        name: tells this runner's messages from those of others.
        keep_logits: every step also returns its logits, for tests.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        *,
        max_model_len: int,
        num_pages: int | None = None,
        device_memory: int | None = None,
        draft_model: LoadedModel | None = None,
        channel: Channel | None = None,
        name: str = "model",
        keep_logits: bool = False,
    ) -> None:
        self.model, self.config, self.times = model, config, RunnerTimes()
        self.max_num_seqs = config.scheduler.max_num_seqs
        self.buckets = token_buckets(config.scheduler.max_num_batched_tokens, model.smallest_batch)
        self.step_programs = StepPrograms.of(model, config, max_model_len)
        self._sharding = self.step_programs.sharding
        if num_pages is None:
            beside = None if draft_model is None else StepPrograms.of(draft_model, config.one_group(), max_model_len)
            num_pages = choose_num_pages(self.step_programs, self.buckets[-1], device_memory, beside)
            num_pages = num_pages if channel is None else channel.smallest(num_pages)
        self.num_pages = num_pages
        self._channel, self.name = channel, name
        self._vocab = model.config.vocab_size
        self._clear()
        self._keep_logits = keep_logits
        self._programs: dict[tuple[int, StepFeatures], StepProgram] = {}
        self.is_warm = False

    def reset(self) -> None:
        """Empties pages and slots; the programs stay."""
        self._tell("reset")
        self._clear()

    def sleep(self, *, weights: bool) -> None:
        """Gives back the memory of pages and slots, and of weights; `reset` makes pages again."""
        self.__dict__.pop("state", None)
        if weights:
            self.model = replace(self.model, params=without_values(self.model.params))

    def _tell(self, do: str, arrays: Iterable[np.ndarray] = (), **values: Any) -> None:
        """Has the processes of other hosts do what this one is about to do; see `obey`."""
        if isinstance(self._channel, Leader):
            self._channel.send({"do": do, "runner": self.name, **values}, list(arrays))

    def obey(self, message: dict[str, Any], arrays: list[np.ndarray]) -> None:
        """Does what the first process does (`_tell`)."""
        if message["do"] == "reset":
            self._clear()
            return
        program = self.compile(message["bucket"], StepFeatures(message["features"]))
        if message["do"] == "step":
            arrays = list(arrays)
            inputs = program.inputs.filled(arrays)
            self._launch(program, inputs, list(zip(message["slots"], arrays[::2], arrays[1::2], strict=True)))

    def _clear(self) -> None:
        sharding = self._sharding
        self.__dict__.pop("state", None)  # two pools would not fit
        with out_of_memory_names_the_setting():
            # Other fields are made by the first step that needs them: PENALTIES has two arrays of slots × vocabulary.
            self.state: StepState = jax.tree.map(sharding.zeros, self.step_programs.state(PLAIN, self.num_pages))
            for pool in self.state.cache.values():
                empty_in_huge_pages(pool)
        self._slots = [
            SlotTable(self.max_num_seqs, self.step_programs.pages_per_seq, len(self.step_programs.groups.windows))
            for _ in range(sharding.num_shards)
        ]
        # Sequences that have got a slot whose row of `state.penalties` is not set, and their shards: steps of a prompt that
        # do not draw have no such state.
        self._unset: dict[Sequence, int] = {}

    def program(self, bucket: int, needed: StepFeatures = PLAIN) -> StepProgram:
        """Returns the compiled program of a bucket with all `needed` features and the fewest others, or else compiles one."""
        able = self._able(bucket, needed)
        return self.compile(bucket, min(able, key=lambda features: features.value.bit_count(), default=needed))

    def has(self, bucket: int, features: StepFeatures) -> bool:
        """Tells whether there is a program with these features, or with more; the plain one counts only as it is."""
        return (bucket, features) in self._programs or (features != PLAIN and bool(self._able(bucket, features)))

    def _able(self, bucket: int, needed: StepFeatures) -> list[StepFeatures]:
        return [features for b, features in list(self._programs) if b == bucket and serves(features, needed)]

    def compile(self, bucket: int, features: StepFeatures = PLAIN) -> StepProgram:
        """Returns the program of a bucket with exactly these features, and compiles it on first use."""
        if (bucket, features) not in self._programs:
            self.times.compiles += 1
            self.times.compiles_after_warmup += self.is_warm
            self._tell("compile", bucket=bucket, features=features.value)
            set_slot = self._compile_set_slot() if StepFeatures.PENALTIES in features else None
            lowered = self.step_programs.lower(bucket, features, self.num_pages, keep_logits=self._keep_logits)
            with out_of_memory_names_the_setting():
                run = lowered.compile()
            self._programs[bucket, features] = StepProgram(
                self.step_programs.layout(bucket, features),
                features,
                self.step_programs.state(features, self.num_pages),
                self.step_programs.inputs(bucket, features),
                run,
                set_slot,
            )
        return self._programs[bucket, features]

    def _compile_set_slot(self) -> Callable:
        state = self.step_programs.penalties()
        row = jax.ShapeDtypeStruct((self._vocab,), jnp.int32)
        placed = None if self.model.mesh is None else jax.tree.map(lambda x: x.sharding, state)
        setter = jax.jit(set_slot, donate_argnums=0, out_shardings=placed)
        return setter.lower(state, jax.ShapeDtypeStruct((), jnp.int32), row, row.update(dtype=jnp.float32)).compile()

    def bucket_of(self, num_tokens: int) -> int:
        """Returns the smallest bucket that holds `num_tokens`."""
        return next(bucket for bucket in self.buckets if bucket >= num_tokens)

    def submit(self, plan: StepPlan) -> PendingStep:
        """Starts a step on the device and returns without waiting for it."""
        started = time.perf_counter()
        page_size = self.config.cache.page_size
        for shard, (rows, slots) in enumerate(zip(plan.rows, self._slots, strict=True)):
            for row in rows:
                if slots.update(row, page_size) and StepFeatures.PENALTIES in slots.features_at(row):
                    self._unset[row.sequence] = shard
        needed = self._features(plan)
        bucket = self.bucket_of(plan.num_tokens)
        program = self.program(bucket, needed)
        layout = program.layout
        allowed, dead = None, {}
        if StepFeatures.MASKED in program.features:
            allowed = np.full((len(plan.rows), layout.num_draws, mask_words(self._vocab)), ALL)
            for rows, slots, masks in zip(plan.rows, self._slots, allowed, strict=True):
                dead |= slots.fill_masks(rows, masks)
        # A new buffer each step: on the CPU the device array may be this very memory.
        packed = np.zeros((len(plan.rows), layout.size), np.int32)
        for rows, slots, copies, buffer in zip(plan.rows, self._slots, plan.copies, packed, strict=True):
            fields = layout.views(buffer)
            self._fill(layout, fields, rows, slots, copies)
            if layout.steps > 1:
                fields["max_steps"][0] = plan.num_steps
        prepared = time.perf_counter()
        fresh = [] if program.set_slot is None else self._fresh_rows()
        inputs = StepInputs(packed, allowed)
        arrays = [*inputs.arrays(), *(each for row in fresh for each in row[1:])]
        try:
            self._tell(
                "step", arrays, bucket=bucket, features=program.features.value, slots=[slot for slot, *_ in fresh]
            )
            outputs = self._launch(program, inputs, fresh)
        except BaseException as error:
            if isinstance(self._channel, Leader) and not isinstance(error, Exception):
                self._channel.out_of_step()
            raise
        for value in outputs.values():
            value.copy_to_host_async()
        self.times.prepare += prepared - started
        self.times.dispatch += time.perf_counter() - prepared
        return PendingStep(plan, outputs, dead)

    def _fresh_rows(self) -> list[StateRow]:
        """Returns the rows of the per-slot state for sequences that got their slot since the last step that has such a state."""
        rows = []
        unset, self._unset = self._unset, {}
        for sequence, shard in unset.items():
            params = sequence.request.sampling
            if sequence.slot is not None:
                seen = seen_counts(list(sequence.request.prompt), sequence.output, self._vocab)
                bias = np.zeros(self._vocab, np.float32)
                bias[list(params.logit_bias)] = list(params.logit_bias.values())
                rows.append((shard * (self.max_num_seqs + 1) + sequence.slot, seen, bias))
        return rows

    def _launch(self, program: StepProgram, inputs: StepInputs, rows: list[StateRow]) -> dict[str, jax.Array]:
        """Starts a program after it has set rows of the per-slot state."""
        state = StepState._make(map(self._made, self.state, program.state))
        if program.set_slot is not None:
            penalties = state.penalties
            for slot, seen, bias in rows:
                penalties = program.set_slot(penalties, np.int32(slot), seen, bias)
            state = state._replace(penalties=penalties)
        try:
            state, outputs = program.run(self.model.params, state, inputs)
        except (RuntimeError, ValueError):
            refuse_deleted(self.model.params)  # which is then why
            raise
        self.state = after(self.state, state)
        return outputs

    def _made(self, here: Any, taken: Any) -> Any:
        """Returns a field of the state as a program takes it: nothing, what is there, or zeros at first."""
        if taken is None:
            return None
        return jax.tree.map(self._sharding.zeros, taken) if here is None else here

    def _features(self, plan: StepPlan) -> StepFeatures:
        needed = PLAIN
        for rows, slots in zip(plan.rows, self._slots, strict=True):
            needed |= slots.features(rows)
        if plan.num_steps > 1:
            return for_steps(needed)
        return needed | (StepFeatures.DRAFTS if plan.has_drafts else PLAIN)

    def _fill(
        self,
        layout: StepLayout,
        f: dict[str, np.ndarray],
        rows: tuple[ScheduledRow, ...],
        slots: SlotTable,
        copies: tuple[tuple[int, int], ...],
    ) -> None:
        """Writes one shard's fields; `f` are zeroed views into the step buffer."""
        n, page_size = len(rows), self.config.cache.page_size
        count = np.fromiter((row.count for row in rows), np.int32, n)
        start = np.fromiter((row.start for row in rows), np.int32, n)
        slot = np.fromiter((row.sequence.slot for row in rows), np.int32, n)
        samples = np.fromiter((row.samples for row in rows), bool, n)
        np.take(slots.tables[0], slot, axis=0, out=f["block_tables"][:n])
        if layout.groups > 1:
            np.take(slots.tables[1:], slot, axis=1, out=f["more_tables"][:, :n])
        fill_plan(layout.plan, f, count, start + count, f["block_tables"], page_size)

        ends = np.cumsum(count)
        total = int(ends[-1]) if n else 0
        f["positions"][:total] = np.arange(total, dtype=np.int32) + np.repeat(start - (ends - count), count)
        first = 0
        for row in rows:
            if row.sequence.request.whole_prompt:
                follow = row.sequence.request.prompt[row.start + 1 : row.start + row.count + 1]
                f["targets"][first : first + len(follow)] = follow
            if row.feeds:
                f["feeds"][first], f["feed_slot"][first] = 1, row.sequence.slot
            else:
                end = row.start + row.count - len(row.drafts)
                f["token_ids"][first : first + row.count] = (*row.sequence.tokens[row.start : end], *row.drafts)
            first += row.count
        if layout.states:
            for name, values in (
                ("state_from", (row.state_from for row in rows)),
                ("state_to", (row.state_to for row in rows)),
                ("state_count", (row.certain for row in rows)),
            ):
                f[name][:n] = np.fromiter(values, np.int32, n)
        f["logits_row"][:n] = ends - 1
        f["slot"][:] = self.max_num_seqs
        f["slot"][:n] = np.where(samples, slot, self.max_num_seqs)
        f["position"][:n] = start + count
        for field in ROW_FIELDS:
            np.take(slots.fields[field.name], slot, out=f[field.name][:n])
            if field.neutral:
                f[field.name][n:] = field.neutral
        if layout.steps > 1:
            f["num_steps"][:n] = np.fromiter((row.steps for row in rows), np.int32, n)
            f["stop_ids"][:n] = slots.stop_ids[slot]
        # A row whose draw nobody reads must not cost the batch its greedy fast path.
        f["temperature"][:n] *= samples
        if any(row.drafts for row in rows):
            self._fill_drafts(f, rows, slots, ends, slot)
        if copies:
            f["copy_from"][: len(copies)], f["copy_to"][: len(copies)] = zip(*copies, strict=True)
            f["num_copies"][0] = len(copies)

    def _fill_drafts(
        self,
        f: dict[str, np.ndarray],
        rows: tuple[ScheduledRow, ...],
        slots: SlotTable,
        ends: np.ndarray,
        slot: np.ndarray,
    ) -> None:
        """Writes, behind the draws of the rows, those after every token of a row with drafts but its last."""
        drafts = np.fromiter((len(row.drafts) for row in rows), np.int32, len(rows))
        owner = np.repeat(np.arange(len(rows)), drafts)
        to_end = np.concatenate([np.arange(count, 0, -1) for count in drafts])
        here = slice(len(rows), len(rows) + len(owner))
        f["logits_row"][here] = (ends - 1)[owner] - to_end
        f["position"][here] = f["position"][owner] - to_end
        for name, values in slots.fields.items():
            f[name][here] = values[slot[owner]]
        # Which id is the last one only the host will know.
        f["slot"][np.flatnonzero(drafts)] = self.max_num_seqs
