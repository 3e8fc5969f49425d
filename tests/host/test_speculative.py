"""Proposals: what is looked up, how many are tried, how they are accepted, and pages of rejected ones."""

from __future__ import annotations

import pytest

from llm_infer.base.errors import UserError
from llm_infer.config import SpeculativeConfig
from llm_infer.decoding.speculative import NgramProposer, Speculator
from tests.host.fake_device import FakeEngine, next_token


def test_the_longest_and_latest_match_is_continued() -> None:
    proposer = NgramProposer(3, 1)
    state = proposer.new_state(None)
    assert proposer.propose(state, [1, 2, 3], 4) == []
    assert proposer.propose(state, [1, 2, 3, 9, 2], 4) == [3, 9, 2]
    # After (9, 2) only 3 came; after 2 alone 5 came last.
    assert proposer.propose(state, [1, 2, 3, 9, 2, 3, 7, 2, 5, 9, 2], 2) == [3, 7]
    assert proposer.propose(state, [1, 2, 3, 9, 2, 3, 7, 2, 5, 9, 2, 4], 2) == []
    assert NgramProposer(3, 2).propose({(): 0}, [1, 2, 1], 2) == []


def test_proposals_get_longer_with_acceptance_and_shorter_where_steps_cost() -> None:
    speculator = Speculator(SpeculativeConfig(num_speculative_tokens=7), lambda n: max(2, 1 << (n - 1).bit_length()))
    for tokens, seconds in ((2, 1.0), (4, 1.1), (8, 1.5), (16, 2.8), (32, 5.5)):
        speculator.observe_time(tokens, seconds)
    assert [speculator.best_length(acceptance, 1) for acceptance in (0.05, 0.5, 0.8, 0.99)] == [1, 3, 7, 7]
    assert speculator.best_length(0.3, 4) < speculator.best_length(0.95, 4)
    assert speculator.best_length(0.1, 16) == 0
    speculation = speculator.new(None)
    for _ in range(20):
        speculator.observe(speculation, 1, 0)
    assert speculation.rest == speculator.MAX_REST and speculation.acceptance < 0.01
    assert (speculation.drafted, speculation.accepted) == (speculator.num_drafted, speculator.num_accepted) == (20, 0)


def test_a_time_measured_on_a_busy_machine_is_forgotten() -> None:
    speculator = Speculator(SpeculativeConfig(num_speculative_tokens=1), lambda n: n)
    for tokens, seconds in ((1, 1.0), (2, 9.0)):
        speculator.observe_time(tokens, seconds)
    assert speculator.best_length(0.9, 1) == 0
    for _ in range(300):
        speculator.observe_time(1, 1.0)
    assert speculator.best_length(0.9, 1) == 1
    speculator.observe_time(2, 1.7)  # what a trial finds counts at once
    assert speculator.best_length(0.9, 1) == 1 and speculator.best_length(0.5, 1) == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_accepted_tokens_come_in_one_step_and_pages_of_others_go_back(overlap: bool) -> None:
    engine = FakeEngine(overlap=overlap, num_drafts=4, max_model_len=200, num_pages=100)
    output: list[int] = []
    for _ in range(40):
        output.append(next_token([1, 2, 3, *output], 0))
    script = [output[1:4], [9], output[6:10], [*output[11:13], 9, 9]]
    assert engine.scheduler.speculator is not None
    engine.scheduler.speculator.propose = (  # type: ignore[method-assign]
        lambda speculation, tokens, rows, limit: [] if len(tokens) < 4 or not script else script.pop(0)[:limit]
    )
    request = engine.add([1, 2, 3], max_tokens=40)
    speculator = engine.scheduler.speculator
    while not request.finished:
        engine.step()
        table, sequence = request.sequences[0].table, request.sequences[0]
        if table is not None and not sequence.in_flight:
            assert len(table.pages) == -(-sequence.num_computed // 4)
    engine.verify(request)
    assert speculator.num_drafted == sum(len(row.drafts) for plan in engine.plans for row in plan.rows[0])
    assert 0 < speculator.num_accepted < speculator.num_drafted
    assert len(engine.plans) < 40 + overlap


def test_bad_settings_name_what_is_wrong() -> None:
    for values, message in (
        ({"method": "medusa"}, "method"),
        ({"method": "ngram", "k": 3}, "unknown keys"),
        ("ngram", "expected a mapping"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min"),
    ):
        with pytest.raises(UserError, match=message):
            SpeculativeConfig.of(values)
