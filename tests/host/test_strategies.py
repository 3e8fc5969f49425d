"""A strategy that the scheduler has never heard of: what one has to say, and that nothing else must change for it."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest

from llm_infer.scheduler import ScheduledRow, Sequence, Status
from llm_infer.scheduler.plan_builder import ShardPlan
from llm_infer.scheduler.step_result import StepResult
from llm_infer.scheduler.strategies.draw import Draw
from tests.host.fake_device import EOS, FakeEngine

BLOCK = 4


class Jacobi(Draw):
    """Guesses a block of tokens at once and computes it again and again, each time with the draws of the last time.

    (Santilli et al., 2023, "Accelerating transformer inference for translation via parallel decoding")
    """

    def __init__(self) -> None:
        self.guesses: dict[Sequence, list[int]] = {}
        self.steps = self.tokens = 0

    def rows(self, sequence: Sequence, plan: ShardPlan) -> None:
        if sequence.in_flight or not plan.make_room(sequence):  # the last result is not here, or no page is
            return
        table, guesses = sequence.table, self.guesses.get(sequence, [])[:BLOCK]
        guesses += [0] * min(BLOCK - len(guesses), sequence.max_length - sequence.length - 1)
        guesses = guesses[: max(0, min(len(guesses), plan.budget - len(plan.running)))]
        assert table is not None
        if table.pages_needed(len(guesses)) > plan.num_available:
            guesses = []
        plan.extend(table, table.length + len(guesses))
        plan.num_drafts += len(guesses)
        sequence.num_drafts = len(guesses)
        plan.add_row(sequence, 1, tuple(guesses))

    def commit(self, row: ScheduledRow, drawn: SequenceOf[int], result: StepResult) -> None:
        sequence, before = row.sequence, len(row.sequence.tokens)
        right = next((i for i, guess in enumerate(row.drafts) if guess != drawn[i]), len(row.drafts))
        super().commit(row, drawn[: right + 1], result)
        sequence.num_drafts = 0
        self.guesses[sequence] = list(drawn[right + 1 :])
        self.steps, self.tokens = self.steps + 1, self.tokens + len(sequence.tokens) - before
        if row.drafts and sequence.status is Status.RUNNING:
            assert sequence.table is not None
            sequence.num_computed = len(sequence.tokens) - 1
            sequence.table.truncate(sequence.num_computed)

    def goes_on(self, sequence: Sequence, steps: int) -> bool:
        return False


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": False},
        {"num_pages": 15},
        {"num_pages": 15, "overlap": False, "enable_prefix_caching": False},
        {"num_shards": 2, "num_pages": 15},
        {"num_scheduler_steps": 4},
    ],
    ids=str,
)
def test_a_strategy_of_ones_own_gives_the_tokens_of_plain_draws(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, jacobi = random.Random(5), Jacobi()
    engine = FakeEngine(max_num_batched_tokens=24, **options)
    of = engine.scheduler._strategies.of
    monkeypatch.setattr(
        engine.scheduler._strategies, "of", lambda request: jacobi if request.priority == 1 else of(request)
    )
    for index in range(16):
        prompt = [draw.randint(0, 5) for _ in range(draw.randint(1, 12))]
        engine.add(prompt, n=1 + index % 3, max_tokens=24, priority=index % 2, eos_token_ids=frozenset({EOS}))
        engine.add(prompt, beam_width=3, max_tokens=8, length_penalty=0.5)
    engine.run()
    for request in engine.requests:
        engine.verify(request)
    assert jacobi.tokens > jacobi.steps, "no guess was ever right"
    assert all(engine.scheduler.usage(shard) == 0.0 for shard in range(engine.scheduler.num_shards))
