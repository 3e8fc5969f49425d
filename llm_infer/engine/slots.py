"""What a running sequence brings to every step, by slot, on the host: block table, sampling parameters, rules of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from llm_infer.decoding.features import StepFeatures
from llm_infer.decoding.token_rules import Matcher
from llm_infer.engine.step.features import FOR_PROMPT
from llm_infer.engine.step.layout import STOP_IDS
from llm_infer.engine.step.row_fields import ROW_FIELDS
from llm_infer.scheduler.plan import ScheduledRow
from llm_infer.scheduler.request import Sequence


class SlotTable:
    """Rows of a shard's `slots` sequences; `fields` has those of ROW_FIELDS by name, `tables` the pages of each group."""

    def __init__(self, slots: int, pages_per_seq: int, groups: int = 1) -> None:
        array = partial(np.zeros, slots)
        self.tables = np.zeros((groups, slots, pages_per_seq), np.int32)
        self._first, *self._others = self.tables  # most models have one group only, which a loop would cost
        self.fields = {field.name: array(field.dtype) for field in ROW_FIELDS}
        self.stop_ids = np.full((slots, STOP_IDS), -1, np.int32)
        self._features = array(np.int64)
        self._matchers: list[Matcher | None] = [None] * slots
        self._owners: list[tuple[Sequence, int] | None] = [None] * slots

    def update(self, row: ScheduledRow, page_size: int) -> bool:
        """Brings the slot of a row up to date; True if its sequence has just got the slot.

        Only pages that this step writes can have changed since the last step, but for those that a window has left behind:
        nobody looks at them.
        """
        sequence, slot = row.sequence, row.sequence.slot
        assert slot is not None and sequence.table is not None, "a scheduled sequence has a slot and pages"
        groups = sequence.table.groups
        owner = (sequence, sequence.first_step)  # a sequence that was preempted comes back with other pages
        fresh = self._owners[slot] != owner
        if fresh:
            self._owners[slot] = owner
            self._set_fields(sequence, slot)
            self.tables[:, slot] = 0
            first = 0
        else:
            first = row.start // page_size
            last = (row.end - 1) // page_size
            if first == last:
                self._first[slot, first] = groups[0][first]
                if self._others:
                    for table, pages in zip(self._others, groups[1:], strict=True):
                        table[slot, first] = pages[first]
                return False
        for table, pages in zip(self.tables, groups, strict=True):
            table[slot, first : len(pages)] = pages[first:]
        return fresh

    def features_at(self, row: ScheduledRow) -> StepFeatures:
        """Returns what the sequence of a row needs, whose slot is up to date."""
        return StepFeatures(int(self._features[row.sequence.slot or 0]))

    def features(self, rows: Iterable[ScheduledRow]) -> StepFeatures:
        """Returns what a shard's rows need, all of whose slots are up to date."""
        drawing = [row.sequence.slot or 0 for row in rows if row.samples]
        needed = StepFeatures(int(np.bitwise_or.reduce(self._features[drawing], initial=0))) & ~FOR_PROMPT
        for row in rows:
            if row.sequence.request.whole_prompt and row.start < len(row.sequence.request.prompt):
                needed |= self.features_at(row) & FOR_PROMPT
        return needed

    def fill_masks(self, rows: Iterable[ScheduledRow], masks: np.ndarray) -> dict[Sequence, str]:
        """Writes the masks [S, W] of a shard's rows that draw and have rules.

        Returns:
            Sequences that no token may follow, and why.
        """
        dead = {}
        for mask, row in zip(masks, rows, strict=False):
            sequence, rules = row.sequence, row.sequence.request.rules
            if row.samples and rules is not None:
                assert sequence.slot is not None
                num_new = row.start + row.count - len(sequence.request.prompt)
                why = rules.fill(mask, num_new, sequence.output, self._matchers[sequence.slot])
                if why is not None:
                    mask[:] = -1
                    dead[sequence] = why
        return dead

    def _set_fields(self, sequence: Sequence, slot: int) -> None:
        rules = sequence.request.rules
        self._features[slot] = sequence.request.features.value
        # A matcher that starts anew reads all of the output: a preempted sequence needs nothing kept.
        grammar = None if rules is None else rules.grammar
        self._matchers[slot] = None if grammar is None else grammar.matcher()
        stops = sorted(sequence.stop_ids)[:STOP_IDS]
        self.stop_ids[slot] = stops + [-1] * (STOP_IDS - len(stops))
        for field in ROW_FIELDS:
            self.fields[field.name][slot] = field.value(sequence)
