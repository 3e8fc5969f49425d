"""Draws whose rows also compute proposed tokens: for which sequences, how many, and which of them are accepted."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from llm_infer.decoding.speculative import Speculation, Speculator
from llm_infer.scheduler.plan import ScheduledRow
from llm_infer.scheduler.plan_builder import PlanBuilder, ShardPlan
from llm_infer.scheduler.request import Sequence, Status
from llm_infer.scheduler.step_result import StepResult
from llm_infer.scheduler.strategies.draw import Draw
from llm_infer.scheduler.strategies.several_steps import add_steps

MAX_DRAFTS = 32
"""Proposed tokens of one step, per shard."""


class Speculative(Draw):
    """Draws like Draw, and has a speculator propose tokens. A sequence with drafts waits for their result.

    Args:
        speculator: proposes tokens, for all sequences.
        budget: tokens of a step at most.
    """

    def __init__(self, speculator: Speculator, budget: int) -> None:
        self.speculator = speculator
        self._budget = budget

    def prepare(self, plan: PlanBuilder) -> None:
        """Tells the speculator for which sequences a plan may ask for proposals, all at once."""
        asked = []
        for running in plan.books.running:
            used = 0
            for sequence in running:
                resting = sequence.speculation is not None and sequence.speculation.rest
                decodes = sequence.length - sequence.num_computed == 1
                if sequence.in_flight or sequence.num_drafts or resting or not decodes or not self._may(sequence):
                    continue
                limit = self._max_drafts(sequence, len(running), used)
                if limit > 0:
                    used += min(limit, self.speculator.max_tokens - 1)
                    asked.append((self._speculation(sequence), sequence.tokens, len(running), limit))
        if asked:
            self.speculator.prepare(asked)

    def rows(self, sequence: Sequence, plan: ShardPlan) -> None:
        """Implements `Strategy`."""
        if plan.steps > 1:
            self._speculation(sequence).rest -= add_steps(sequence, plan)
        elif not sequence.num_drafts and plan.make_room(sequence):
            plan.add_row(sequence, 1, self._drafts(sequence, plan))

    def commit(self, row: ScheduledRow, drawn: SequenceOf[int], result: StepResult) -> None:
        """Accepts proposed tokens as far as the target drew them itself, and gives back the places of the others."""
        if not row.drafts:
            super().commit(row, drawn, result)
            return
        sequence, before, equal = row.sequence, len(row.sequence.tokens), 0
        sequence.num_drafts = 0
        while equal < len(row.drafts) and drawn[equal] == row.drafts[equal]:
            equal += 1
        super().commit(row, drawn[: equal + 1], result)
        accepted = len(sequence.tokens) - before - 1
        self.speculator.observe(self._speculation(sequence), len(row.drafts), accepted)
        if sequence.status is Status.RUNNING:
            assert sequence.table is not None
            sequence.num_computed = row.start + row.certain if row.state_to else len(sequence.tokens) - 1
            sequence.table.truncate(sequence.num_computed)

    def goes_on(self, sequence: Sequence, steps: int) -> bool:
        """Implements `Strategy`: nothing is to be proposed for so long."""
        speculation = sequence.speculation
        return speculation is not None and speculation.rest >= steps and super().goes_on(sequence, steps)

    def needs_result(self, sequence: Sequence) -> bool:
        """Implements `Strategy`: whoever proposes needs the last token."""
        return sequence.num_drafts > 0 or sequence.speculation is None or not sequence.speculation.rest

    def ended(self, sequence: Sequence) -> None:
        """Implements `Strategy`."""
        sequence.num_drafts = 0
        if sequence.speculation is not None:
            self.speculator.release(sequence.speculation)

    def _speculation(self, sequence: Sequence) -> Speculation:
        if sequence.speculation is None:
            sequence.speculation = self.speculator.new(sequence)
        return sequence.speculation

    def _may(self, sequence: Sequence) -> bool:
        """Tells whether tokens may be proposed: it has drawn one (the steps before are those of the prompt)."""
        return sequence.request.strategy is self and len(sequence.tokens) > len(sequence.request.prompt)

    def _max_drafts(self, sequence: Sequence, num_running: int, used: int) -> int:
        """Returns how many tokens may be proposed for a sequence if `used` are for others; below 1 for none."""
        left = self._budget - num_running - used
        return min(MAX_DRAFTS - used, left, sequence.max_length - len(sequence.tokens) - 1)

    def _drafts(self, sequence: Sequence, plan: ShardPlan) -> tuple[int, ...]:
        """Proposes tokens behind the next one of a sequence, and makes their places if pages are there anyway."""
        table = sequence.table
        if not self._may(sequence):
            return ()
        speculation = self._speculation(sequence)
        if speculation.rest:
            speculation.rest -= 1
            return ()
        num_running = len(plan.running)
        limit = self._max_drafts(sequence, num_running, plan.num_drafts)
        drafts = []
        if limit > 0 and not sequence.in_flight:
            drafts = self.speculator.propose(speculation, sequence.tokens, num_running, limit)
        assert table is not None
        if not drafts or table.pages_needed(len(drafts)) > plan.num_available:
            return ()
        plan.extend(table, table.length + len(drafts))
        plan.num_drafts += len(drafts)
        sequence.num_drafts = len(drafts)
        return tuple(drafts)
