"""For which sequences tokens may be proposed in the next step, and how many."""

from __future__ import annotations

from llm_infer.decoding.speculative import Speculator
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.request import Sequence

MOST_DRAFTS = 32
"""Proposed tokens of one step, per shard."""


def may_speculate(sequence: Sequence) -> bool:
    """Its request allows it, and it has drawn a token (the steps before are those of the prompt)."""
    return sequence.request.speculate and len(sequence.tokens) > len(sequence.request.prompt)


def most_drafts(sequence: Sequence, num_running: int, used: int, budget: int) -> int:
    """Tokens that may be proposed for a sequence if `used` are for others; below 1 for none."""
    return min(MOST_DRAFTS - used, budget - num_running - used, sequence.max_length - len(sequence.tokens) - 1)


def prepare_proposals(speculator: Speculator, books: Books, budget: int) -> None:
    """Tells the speculator for which sequences the next step may ask for proposals, all at once."""
    asked = []
    for running in books.running:
        used = 0
        for sequence in running:
            resting = sequence.speculation is not None and sequence.speculation.rest
            decodes = sequence.length - sequence.num_computed == 1
            if not may_speculate(sequence) or sequence.in_flight or sequence.num_drafts or resting or not decodes:
                continue
            limit = most_drafts(sequence, len(running), used, budget)
            if limit > 0:
                sequence.speculation = sequence.speculation or speculator.new(sequence)
                used += min(limit, speculator.most_tokens - 1)
                asked.append((sequence.speculation, sequence.tokens, len(running), limit))
    if asked:
        speculator.prepare(asked)
