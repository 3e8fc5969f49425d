"""Proposals by a second, smaller model, over pages of its own: it draws with the keys that the target model draws with."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from llm_infer.base.errors import UserError
from llm_infer.config import EngineConfig
from llm_infer.decoding.features import PLAIN
from llm_infer.decoding.speculative import Speculator
from llm_infer.engine.programs import StepPrograms
from llm_infer.engine.runner import Runner
from llm_infer.engine.warm_up import WarmUp, prefill_sizes, up_to
from llm_infer.kvcache.page_allocator import PageAllocator
from llm_infer.kvcache.page_table import PageTable
from llm_infer.models.load import LoadedModel
from llm_infer.parallel.distributed import Channel
from llm_infer.scheduler.plan import ScheduledRow, StepPlan
from llm_infer.scheduler.request import Sequence


@dataclass(slots=True, eq=False)
class DraftState:
    """What the draft model has of a sequence of the target.

    Attributes:
        target: the sequence of the target model.
        own: its twin, with pages and a slot of the draft model; None while it has none.
        drafts: the last proposal.
    """

    target: Sequence
    own: Sequence | None = None
    drafts: list[int] = field(default_factory=list)


class DraftModel:
    """A proposer (see `decoding.speculative`). All sequences of a step are drafted together, in two programs.

    The first computes the tokens that the target has accepted since, chunk by chunk where they are many, and draws; the
    second decodes the rest of the proposals. A sequence keeps pages and slot from proposal to proposal; if others need
    them, those used longest ago give theirs up and compute their tokens again.

    Args:
        model: the draft model.
        vocab_size: of the target model; both must have the same tokens.
        config: of the target's engine. The draft model has as many pages and slots.
        max_tokens: most tokens of a proposal.

    Raises:
        UserError: vocabularies or contexts do not fit.
    """

    def __init__(
        self,
        model: LoadedModel,
        vocab_size: int,
        config: EngineConfig,
        max_tokens: int,
        *,
        num_pages: int,
        max_model_len: int,
        num_shards: int = 1,
        channel: Channel | None = None,
    ) -> None:
        if model.config.vocab_size != vocab_size:
            raise UserError(
                f"the draft model has a vocabulary of {model.config.vocab_size} tokens, the model has {vocab_size}: set "
                "speculative_config['model'] to a model with the same tokenizer"
            )
        if model.config.recurrent:
            raise UserError(
                f"a draft model of {model.config.architecture} is not supported: its states cannot be set back when proposals "
                "are refused; take one that only attends, or the method 'ngram'"
            )
        if model.config.max_position_embeddings < max_model_len:
            raise UserError(
                f"the draft model's context is {model.config.max_position_embeddings} tokens, max_model_len is "
                f"{max_model_len}: lower max_model_len or choose another draft model"
            )
        scheduler = replace(config.scheduler, num_scheduler_steps=max(2, max_tokens))
        # Pages of the target may hold fewer layers, of which it then has more.
        num_pages = min(num_pages, StepPrograms.of(model, config.one_group(), max_model_len).most_pages)
        self.runner = Runner(
            model,
            replace(config.one_group(), scheduler=scheduler),
            num_pages=num_pages,
            max_model_len=max_model_len,
            channel=channel,
            name="draft model",
        )
        self._page_size, self._limits = config.cache.page_size, config.scheduler
        self._num_pages, self._num_shards = num_pages, num_shards
        self._num_steps = 0
        self._clear()

    def _clear(self) -> None:
        self.allocator = PageAllocator(self._num_pages, self._num_shards)
        self._free_slots = [list(range(self._limits.max_num_seqs)) for _ in range(self._num_shards)]
        # Those that have pages, the one used longest ago first.
        self._holding: OrderedDict[DraftState, None] = OrderedDict()

    def warm_up(self, programs: WarmUp, prompts: SequenceOf[int], num_sequences: int) -> None:
        """Asks for the programs of proposals for so many sequences with prompts of these lengths.

        A proposal begins with the first new token, then with the one or two that the draft model has not computed, and
        after a rest with all that came meanwhile.
        """
        most = self._limits.max_num_batched_tokens
        sizes = prefill_sizes([count + 1 for count in prompts], self._limits.max_num_seqs, most)
        sizes += up_to(self.runner, min(most, num_sequences * (1 + Speculator.MAX_REST)))
        programs.add(self.runner, sizes, (PLAIN,), up_to(self.runner, num_sequences))

    # ------------------------------------------------------------------ the proposer

    def new_state(self, sequence: Sequence) -> DraftState:
        """Implements `Proposer`."""
        return DraftState(sequence)

    def propose(self, state: DraftState, tokens: SequenceOf[int], count: int) -> list[int]:
        """Returns what `prepare` has found."""
        return state.drafts[:count]

    def release(self, state: DraftState) -> None:
        """Gives back pages and slot."""
        own, state.own = state.own, None
        if own is not None:
            assert own.table is not None and own.slot is not None
            self._free_slots[own.table.shard].append(own.slot)
            own.table.free()
            del self._holding[state]

    def reset(self) -> None:
        """Empties the pages; the states of before are not to be used."""
        self.runner.reset()
        self._clear()

    def prepare(self, asked: SequenceOf[tuple[DraftState, SequenceOf[int], int]]) -> float | None:
        """Drafts for all: (state, tokens, count) of each. Seconds per token if no prompts or compilers took their time."""
        started, compiles, steps = time.perf_counter(), self.runner.times.compiles, self._num_steps
        rows: list[tuple[DraftState, int]] = []
        busy = {state for state, _, _ in asked}
        for state, tokens, count in asked:
            accepted = self._accepted(state, tokens)
            state.drafts = []
            if self._make_room(state, list(tokens), accepted, count, busy):
                rows.append((state, count))
        self._catch_up([state for state, _ in rows])
        self._decode([(state, count - 1) for state, count in rows if count > 1])
        for state, _ in rows:
            stops = state.target.stop_ids
            end = next((i for i, token in enumerate(state.drafts, 1) if token in stops), len(state.drafts))
            del state.drafts[end:]
        if compiles != self.runner.times.compiles or self._num_steps > steps + 2:
            return None
        return (time.perf_counter() - started) / max(count for *_, count in asked)

    # ------------------------------------------------------------------ pages

    def _accepted(self, state: DraftState, tokens: SequenceOf[int]) -> int:
        """Counts the computed tokens that are still those of the sequence; its last token is always computed anew."""
        own = state.own
        if own is None:
            return 0
        computed = [*own.tokens, *state.drafts]
        end = min(own.num_computed, len(computed), len(tokens) - 1)
        first = min(len(own.tokens), end)  # what comes before was the sequence's own
        return next((at for at in range(first, end) if computed[at] != tokens[at]), end)

    def _make_room(
        self, state: DraftState, tokens: list[int], accepted: int, count: int, busy: set[DraftState]
    ) -> bool:
        """Places for `tokens` and all drafts but the last, whose keys nobody reads; False if there are too few pages."""
        target, own = state.target, state.own
        assert target.table is not None
        shard = target.table.shard
        if own is not None and own.table is not None and own.table.shard != shard:
            self.release(state)
            own = None
        while own is None and not self._free_slots[shard]:
            if not self._evict(shard, busy):
                return False
        if own is None:
            accepted = 0
            own = state.own = Sequence(target.request, target.sample_index, target.rank, target.max_length)
            own.table, own.slot = PageTable(self.allocator, shard, self._page_size), self._free_slots[shard].pop()
            own.first_step = self._num_steps  # tells the runner that the slot has another owner
            self._holding[state] = None
        self._holding.move_to_end(state)
        assert own.table is not None
        own.table.truncate(accepted)
        own.tokens, own.num_computed = tokens, accepted
        places = len(tokens) + count - 1 - accepted
        while own.table.pages_needed(places) > self.allocator.num_available(shard):
            if not self._evict(shard, busy):
                self.release(state)
                return False
        own.table.append(places)
        return True

    def _evict(self, shard: int, busy: set[DraftState]) -> bool:
        for state in self._holding:
            own = state.own
            if state not in busy and own is not None and own.table is not None and own.table.shard == shard:
                self.release(state)
                return True
        return False

    # ------------------------------------------------------------------ steps

    def _catch_up(self, states: Iterable[DraftState]) -> None:
        """Computes all tokens that are not, and draws the first token of each proposal."""
        waiting = [(state, state.own) for state in states if state.own is not None]
        drawn = []
        while waiting:
            rows: list[list[tuple[DraftState, ScheduledRow]]] = [[] for _ in range(self._num_shards)]
            budget, left = [self._limits.max_num_batched_tokens] * self._num_shards, []
            for state, own in waiting:
                assert own.table is not None
                shard, start = own.table.shard, own.num_computed
                count = min(len(own.tokens) - start, budget[shard])
                ends = start + count == len(own.tokens)
                if count:
                    rows[shard].append((state, ScheduledRow(own, start, count, ends, False)))
                    budget[shard] -= count
                    own.num_computed += count
                if not ends:
                    left.append((state, own))
            drawn.append(self._submit(rows))
            waiting = left
        for plan, states_of, pending in drawn:
            ids = pending.read()["ids"]
            for shard, planned in enumerate(plan.rows):
                for i, row in enumerate(planned):
                    if row.samples:
                        states_of[row.sequence].drafts.append(int(ids[shard, i]))

    def _decode(self, asked: Iterable[tuple[DraftState, int]]) -> None:
        """Draws `count` more tokens of each proposal."""
        rows: list[list[tuple[DraftState, ScheduledRow]]] = [[] for _ in range(self._num_shards)]
        for state, count in asked:
            own = state.own
            assert own is not None and own.table is not None
            rows[own.table.shard].append((state, ScheduledRow(own, own.num_computed, 1, True, True, steps=count)))
            own.num_computed += count
        if not any(rows):
            return
        plan, states_of, pending = self._submit(rows)
        ids = pending.read()["ids"]
        for shard, planned in enumerate(plan.rows):
            for i, row in enumerate(planned):
                found = ids[shard, : row.steps, i] if plan.num_steps > 1 else ids[shard, i : i + 1]
                states_of[row.sequence].drafts += found.tolist()

    def _submit(self, rows: list[list[tuple[DraftState, ScheduledRow]]]) -> tuple:
        states_of = {row.sequence: state for each in rows for state, row in each}
        ordered = tuple(tuple(sorted((row for _, row in each), key=lambda row: row.count > 1)) for each in rows)
        plan = StepPlan(
            self._num_steps,
            ordered,
            copies=((),) * self._num_shards,
            num_tokens=max(sum(row.count for row in shard) for shard in ordered),
            num_steps=max(row.steps for shard in ordered for row in shard),
        )
        self._num_steps += 1
        return plan, states_of, self.runner.submit(plan)
