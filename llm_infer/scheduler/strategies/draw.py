"""The plain strategy: each step draws a token for each sequence, or several one after the other."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from llm_infer.scheduler.plan import ScheduledRow
from llm_infer.scheduler.plan_builder import ShardPlan
from llm_infer.scheduler.request import Sequence, Status, TokenEvent
from llm_infer.scheduler.step_result import StepResult
from llm_infer.scheduler.strategies.several_steps import add_steps
from llm_infer.scheduler.strategies.strategy import Strategy


class Draw(Strategy):
    """Draws `n` samples that share nothing but the pages of their prompt."""

    def rows(self, sequence: Sequence, plan: ShardPlan) -> None:
        """Implements `Strategy`."""
        if plan.steps > 1:
            add_steps(sequence, plan)
        elif plan.make_room(sequence):
            plan.add_row(sequence, 1)

    def commit(self, row: ScheduledRow, drawn: SequenceOf[int], result: StepResult) -> None:
        """Appends what was drawn as far as the sequence goes, and ends it if it does."""
        sequence, reason = row.sequence, None
        request, tokens, events = sequence.request, sequence.tokens, result.events
        for token in drawn:
            tokens.append(token)
            if token in sequence.stop_ids and len(tokens) - len(request.prompt) >= request.sampling.min_tokens:
                reason = "stop"
            elif len(tokens) >= sequence.max_length:
                reason = "length"
            events.append(TokenEvent(sequence, token, reason))
            if reason is not None:
                break
        windows = sequence.table is not None and sequence.table.has_windows
        # The last token is not computed. Proposals that were accepted are not in the state, and are computed once more.
        computed = row.start + row.certain if row.state_to and row.drafts else len(tokens) - 1
        if windows or computed >= sequence.num_cached_pages * result.page_size + result.page_size:
            result.offer_pages(sequence, computed)
        if reason is not None:
            result.finish(sequence, reason)

    def fork(self, first: Sequence, plan: ShardPlan) -> None:
        """Lets the other samples wait with the pages of the prompt; they compute only its last token again."""
        request = first.request
        request.forked = True
        for sample in request.sequences[1:]:
            if sample.status is Status.WAITING:
                plan.books.fork(first, sample)
                plan.step.forked.append(sample)

    def goes_on(self, sequence: Sequence, steps: int) -> bool:
        """Implements `Strategy`: it decodes, and neither rules nor `min_tokens` have the host look at each token."""
        request, length = sequence.request, sequence.length
        return (
            not request.stepwise
            and length - sequence.num_computed == 1
            and sequence.num_computed >= len(request.prompt)
            and length - len(request.prompt) >= request.sampling.min_tokens
        )
