"""Speculative decoding on the host: who proposes tokens, how many are worth a try, and what came of them.

A proposed token is computed together with the one before it and accepted if and only if the target model itself draws it
at that position with that position's key, so the output does not depend on what is proposed (Leviathan et al., 2023,
with equality in place of their acceptance test).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llm_infer.config import SpeculativeConfig


class Proposer(Protocol):
    """Guesses how sequences go on. What it remembers of a sequence is in a state that it makes."""

    def new_state(self, sequence: Any) -> Any:
        """Makes the state of a sequence (of the scheduler) of which it has seen nothing."""
        ...

    def prepare(self, asked: Sequence[tuple[Any, Sequence[int], int]]) -> float | None:
        """Hears, once a step, of all calls of `propose` that may follow: (state, tokens, count) of each.

        Returns:
            The seconds that each further token of the proposals costs; None if nothing can be said of it.
        """
        ...

    def release(self, state: Any) -> None:
        """Forgets a sequence that has ended."""
        ...

    def reset(self) -> None:
        """Forgets all sequences, which have ended, and what was computed for them."""
        ...

    def propose(self, state: Any, tokens: Sequence[int], count: int) -> list[int]:
        """Guesses at most `count` next tokens; `tokens` only grow from call to call with the same state."""
        ...


class NgramProposer:
    """Guesses what followed the last tokens before; the longest match wins (Saxena, 2023, "Prompt lookup decoding").

    Args:
        longest, shortest: tokens that must match.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def new_state(self, sequence: Any) -> dict[tuple[int, ...], int]:
        """Makes a map from each run of tokens to the position behind its last occurrence; () → tokens seen."""
        return {(): 0}

    def prepare(self, asked: Sequence[tuple[Any, Sequence[int], int]]) -> None:
        """Does nothing: proposals cost next to nothing."""

    def release(self, state: Any) -> None:
        """Does nothing: the state is all there is."""

    def reset(self) -> None:
        """Does nothing: the states are all there is."""

    def propose(self, state: dict[tuple[int, ...], int], tokens: Sequence[int], count: int) -> list[int]:
        """Implements `Proposer`, with a few dictionary accesses per new token, whatever the length."""
        for end in range(state[()], len(tokens)):
            for size in self._sizes:
                if 0 < size <= end:
                    state[tuple(tokens[end - size : end])] = end
        state[()] = len(tokens)
        for size in self._sizes:
            start = state.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if start is not None:
                return list(tokens[start : start + count])
        return []


class Speculation:
    """What is known of speculating on one sequence.

    Attributes:
        state: the proposer's.
        acceptance: estimated probability that a proposed token is accepted if those before it are.
        failures: proposals in a row that gave nothing.
        rest: steps for which nothing is to be tried.
        drafted, accepted: tokens proposed and accepted.
    """

    __slots__ = ("acceptance", "accepted", "drafted", "failures", "rest", "state")

    def __init__(self, state: Any) -> None:
        self.state = state
        self.acceptance = 0.7
        self.failures = self.rest = 0
        self.drafted = self.accepted = 0


class Speculator:
    """Decides how many tokens to propose, from measured acceptance and the measured time of a step of that size.

    Attributes:
        num_drafted, num_accepted: tokens of all sequences.
    """

    MAX_REST = 32
    """Steps between two tries on a sequence on which all fail."""

    REST_WITHOUT_MATCH = 4
    """The same where there was nothing to try: such a step costs only that the host did not work during the one before."""

    def __init__(
        self,
        config: SpeculativeConfig,
        bucket_of: Callable[[int], int] = lambda tokens: tokens,
        proposer: Proposer | None = None,
    ) -> None:
        self._max_drafts = config.num_speculative_tokens
        self.proposer = proposer or NgramProposer(config.prompt_lookup_max, config.prompt_lookup_min)
        self._bucket_of = bucket_of
        # By size of a step: how long it took, and when that was measured last, in measured steps.
        self._seconds: dict[int, tuple[float, int]] = {}
        self._num_times = 0
        self._seconds_to_propose: float | None = None
        self.num_drafted = self.num_accepted = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of a sequence in a step at most."""
        return 1 + self._max_drafts

    def new(self, sequence: Any) -> Speculation:
        """Makes what is known of a sequence that starts."""
        return Speculation(self.proposer.new_state(sequence))

    def prepare(self, asked: Sequence[tuple[Speculation, Sequence[int], int, int]]) -> None:
        """Hears, once a step, the arguments of all calls of `propose` that may follow."""
        wanted = []
        for speculation, tokens, num_rows, limit in asked:
            if count := min(limit, self.best_length(speculation.acceptance, num_rows)):
                wanted.append((speculation.state, tokens, count))
        seconds = self.proposer.prepare(wanted) if wanted else None
        if seconds is not None:
            self._seconds_to_propose = _smooth(self._seconds_to_propose, seconds)

    def release(self, speculation: Speculation) -> None:
        """Forgets a sequence that has ended."""
        self.proposer.release(speculation.state)

    def propose(self, speculation: Speculation, tokens: Sequence[int], num_rows: int, limit: int) -> list[int]:
        """Proposes tokens to compute with the next one, at most `limit`; `num_rows` sequences are in the step."""
        count = min(limit, self.best_length(speculation.acceptance, num_rows))
        if count == 0:
            # Not worth it at this estimate, which grows old: some time later one try shows whether it still holds.
            speculation.acceptance = min(1.0, 1.2 * speculation.acceptance + 0.02)
        drafts = self.proposer.propose(speculation.state, tokens, count) if count else []
        if not drafts:
            self._fail(speculation, self.MAX_REST if count == 0 else self.REST_WITHOUT_MATCH)
        return drafts

    def best_length(self, acceptance: float, num_rows: int) -> int:
        """Finds the length of proposals with the most expected tokens per second if each of `num_rows` rows has one."""
        expected, best, length = 1.0, 1.0 / self._seconds_of(num_rows), 0
        for count in range(1, self._max_drafts + 1):
            expected += acceptance**count
            rate = expected / (self._seconds_of(num_rows * (1 + count)) + count * (self._seconds_to_propose or 0.0))
            if rate >= best:
                best, length = rate, count
        return length

    def observe(self, speculation: Speculation, drafted: int, accepted: int) -> None:
        """Takes in how many of the proposed tokens were accepted."""
        self.num_drafted += drafted
        self.num_accepted += accepted
        speculation.drafted += drafted
        speculation.accepted += accepted
        tried = min(drafted, accepted + 1)
        speculation.acceptance += 0.25 * (accepted / tried - speculation.acceptance)
        if accepted:
            speculation.failures = 0
        else:
            self._fail(speculation, self.MAX_REST)

    def observe_time(self, num_tokens: int, seconds: float) -> None:
        """Takes in how long a step of this many tokens took from submission to its result."""
        bucket = self._bucket_of(num_tokens)
        self._num_times += 1
        before, _ = self._seconds.get(bucket, (None, 0))
        self._seconds[bucket] = _smooth(before, seconds), self._num_times

    def _fail(self, speculation: Speculation, most: int) -> None:
        speculation.failures += 1
        if speculation.failures >= 2:
            speculation.rest = min(most, 2 ** (speculation.failures - 1))

    def _seconds_of(self, num_tokens: int) -> float:
        """Estimates the seconds of a step of that size: measured, or else of the nearest smaller one (a trial will tell).

        What was measured long ago, maybe on a busy machine, is to be tried again: it counts for less from step to step.
        """
        bucket = self._bucket_of(num_tokens)
        known = [size for size in self._seconds if size <= bucket]
        if not known:
            return 1.0
        seconds, measured = self._seconds[max(known)]
        return seconds * 0.99 ** (self._num_times - measured)


def _smooth(before: float | None, seconds: float) -> float:
    """Returns a new estimate of a time: what disturbs makes it longer, so a shorter one counts at once."""
    before = seconds if before is None else before
    return min(before, seconds) + 0.1 * max(0.0, seconds - before)
