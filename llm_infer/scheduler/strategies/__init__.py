"""How requests get their tokens, once their prompts are computed: one file for each strategy, and the choice of one."""

from __future__ import annotations

from llm_infer.decoding.speculative import Speculator
from llm_infer.scheduler.plan_builder import PlanBuilder
from llm_infer.scheduler.request import Request
from llm_infer.scheduler.strategies.beams import Beams
from llm_infer.scheduler.strategies.draw import Draw
from llm_infer.scheduler.strategies.speculative import Speculative
from llm_infer.scheduler.strategies.strategy import Strategy


class Strategies:
    """The strategies of a scheduler.

    Args:
        speculator: proposes tokens for requests that allow it.
        budget: tokens of a step at most.
    """

    def __init__(self, speculator: Speculator | None, budget: int) -> None:
        self._draw = Draw()
        self._speculative = None if speculator is None else Speculative(speculator, budget)

    def of(self, request: Request) -> Strategy:
        """Chooses the strategy of a request, whose sequences are there."""
        if request.sampling.beam_width is not None:
            return Beams(request)
        if request.speculate and self._speculative is not None:
            return self._speculative
        return self._draw

    def prepare(self, plan: PlanBuilder) -> None:
        """Does what strategies do for many sequences at once, before the rows of a plan are made."""
        if self._speculative is not None and plan.steps == 1:
            self._speculative.prepare(plan)
