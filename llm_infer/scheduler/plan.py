"""What one step computes: the scheduler's decision in plain Python ints, before any array is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_infer.scheduler.request import Sequence


@dataclass(slots=True)
class ScheduledRow:
    """Tokens `start … start + count - 1` of one sequence. Nobody changes it; `frozen` would quadruple its cost.

    Attributes:
        sequence: whose tokens they are.
        start: position of the first token (tokens whose K/V are already in the pages).
        count: number of tokens.
        samples: the last of them is the last token of the sequence, so the step draws the next one.
        feeds: the (single) token is still on its way back from the device: the step before drew it.
        drafts: proposed tokens, which are the last ones of the row. The step then draws after each of them, too.
        state_from, state_to: of a recurrent model, the pages of the state before the row and behind it (`kvcache.states`); the
            one before the first token is all zeros, wherever it is read from.
        steps: tokens that are drawn one after the other in this step, each computed before the next is drawn; with more
            than one the row has a single token and no drafts. Fewer come if the sequence ends.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    feeds: bool
    drafts: tuple[int, ...] = ()
    steps: int = 1
    state_from: int = 0
    state_to: int = 0

    @property
    def certain(self) -> int:
        """Tokens of the row that are no proposals: the state takes in these alone."""
        return self.count - len(self.drafts)

    @property
    def end(self) -> int:
        """The position behind the last that the step writes."""
        return self.start + self.count + self.steps - 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        index: counts steps from 0.
        rows: `rows[shard]`, the scheduled rows of each data-parallel shard, rows of one token first.
        copies: `copies[shard]`, pairs (source page, destination page) to copy before anything is written, at most one
            per row. Their order does not matter: no page occurs twice as a destination, or as source and destination.
        num_tokens: tokens of the fullest shard: what the token bucket must hold (of several decode steps in one: of each).
        num_steps: tokens that are drawn one after the other for some row.
        has_drafts: some row has proposed tokens.
        admitted: sequences that got a slot in this step: their per-slot state on the device starts anew.
        preempted: sequences that lost their pages while this step was planned.
    """

    index: int
    rows: tuple[tuple[ScheduledRow, ...], ...]
    copies: tuple[tuple[tuple[int, int], ...], ...]
    num_tokens: int
    num_steps: int = 1
    has_drafts: bool = False
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
