"""What the scheduler asks of a strategy: the way in which the sequences of a request get their next tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf

from llm_infer.scheduler.plan import ScheduledRow
from llm_infer.scheduler.plan_builder import ShardPlan
from llm_infer.scheduler.request import Sequence
from llm_infer.scheduler.step_result import StepResult


class Strategy(ABC):
    """The way in which a request goes on once its prompt is computed. Prompts, and what was lost, the scheduler computes.

    One that remembers nothing of a request serves many. What it needs to know of a sequence is in the sequence.
    """

    @abstractmethod
    def rows(self, sequence: Sequence, plan: ShardPlan) -> None:
        """Adds the rows of a running sequence, all of whose tokens but the last are computed, to a plan; or none."""

    @abstractmethod
    def commit(self, row: ScheduledRow, drawn: SequenceOf[int], result: StepResult) -> None:
        """Takes in what was drawn for a row that samples and whose sequence has not ended meanwhile.

        `drawn` are its ids in their order: usually one; with drafts one for the place of each and one behind them; of several
        steps one each.
        """

    @abstractmethod
    def fork(self, first: Sequence, plan: ShardPlan) -> None:
        """Lets others share the pages of the first sequence of a request, whose last prompt token is in the plan.

        Is called with each plan until the request is `forked`.
        """

    def goes_on(self, sequence: Sequence, steps: int) -> bool:
        """Tells whether a sequence can draw so many tokens, one after the other, before the host sees the first."""
        return False

    def needs_result(self, sequence: Sequence) -> bool:
        """Tells whether the next step of a running sequence can only be planned when the result of the last one is here."""
        return False

    def num_joint(self, sequence: Sequence) -> int:
        """Counts the tokens at the end of a sequence that are only computed together with those of its group."""
        return 0

    def pages_of_others(self, sequence: Sequence, page_size: int) -> list[list[int]] | None:
        """Finds full computed pages that a sequence without pages can share with others of its request, by group.

        An empty list: there are none; None: ask later.
        """
        return []

    def ended(self, sequence: Sequence) -> None:
        """Forgets what was kept for a sequence that has ended; by default nothing was."""
        return
