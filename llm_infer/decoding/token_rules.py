"""Makes, on the host, the bit mask of tokens a sequence may draw next: allowed ids, bad words, least length, grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

ALL = np.int32(-1)
"""A word of the mask that allows all its 32 tokens."""


class Matcher(Protocol):
    """One sequence's progress through a grammar."""

    def fill(self, output: Sequence[int], mask: np.ndarray) -> str | None:
        """Writes the tokens that may follow `output` into `mask` [W] int32; if there are none, says why."""
        ...


class Grammar(Protocol):
    """A compiled grammar, shared by all sequences of a request."""

    def matcher(self) -> Matcher:
        """Returns a matcher for a sequence that starts."""
        ...


def mask_words(vocab_size: int) -> int:
    """Returns the number of 32-bit words of a mask over the vocabulary."""
    return -(-vocab_size // 32)


def mask_of(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """Returns a mask [W] int32 that allows these tokens alone."""
    mask = np.zeros(mask_words(vocab_size), np.int32)
    for token in tokens:
        mask[token >> 5] |= np.array(1 << (token & 31), np.uint32).view(np.int32)
    return mask


def clear(mask: np.ndarray, tokens: Iterable[int]) -> None:
    """Forbids tokens in a mask [W] int32."""
    for token in tokens:
        mask[token >> 5] &= ~np.array(1 << (token & 31), np.uint32).view(np.int32)


class TokenRules:
    """The rules of one request: a token may be drawn where all of them allow it.

    A grammar adds two things. `ignore_eos` forbids the end of a sequence as long as something else may
    follow. Where the grammar is complete and nothing else may follow, the end does, whether it is among the allowed
    tokens or not; only `min_tokens` still forbids it there.

    Args:
        vocab_size: tokens of the vocabulary.
        allowed: ids that may be drawn; None allows all.
        bad_words: token sequences that are never completed.
        min_tokens: new tokens before one of `stop_ids` may be drawn.
        stop_ids: ids that end the output.
        grammar: what the output must match.
        eos_ids: end-of-sequence tokens, with which a grammar lets an output end.
        ignore_eos: those tokens are not to end it.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        allowed: Sequence[int] | None = None,
        bad_words: Iterable[Sequence[int]] = (),
        min_tokens: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        grammar: Grammar | None = None,
        eos_ids: Iterable[int] = (),
        ignore_eos: bool = False,
    ) -> None:
        self._base = np.full(mask_words(vocab_size), ALL) if allowed is None else mask_of(allowed, vocab_size)
        # Bits behind the vocabulary's end must not make an empty mask look as if it allowed something.
        clear(self._base, range(vocab_size, 32 * len(self._base)))
        words = [tuple(word) for word in bad_words]
        clear(self._base, (word[0] for word in words if len(word) == 1))
        self._phrases = [(word[:-1], word[-1]) for word in words if len(word) > 1]
        self._min_tokens, self._stop_ids = min_tokens, stop_ids
        self.grammar = grammar
        self._ends: np.ndarray | None = None
        if grammar is not None:
            self._ends = mask_of(eos_ids, vocab_size)
            self._base &= ~self._ends if ignore_eos else ALL
        self._ways_out = {"allowed_token_ids": "allow more tokens"} if allowed is not None else {}
        self._ways_out |= {"bad_words": "drop some of bad_words"} if words else {}
        self._ways_out |= {"structured_outputs": "change its grammar"} if grammar is not None else {}

    @property
    def why_nothing_starts(self) -> str | None:
        """The reason why no first token is left, and what to change; None if one is left."""
        return self.fill(self._base.copy(), 0, (), None if self.grammar is None else self.grammar.matcher())

    @property
    def needs_last_token(self) -> bool:
        """Whether the next mask depends on the id drawn last, so that the host must know it first."""
        return bool(self._phrases) or self.grammar is not None

    def fill(self, mask: np.ndarray, num_new: int, output: Sequence[int], matcher: Matcher | None) -> str | None:
        """Writes the mask [W] int32 of a sequence's next draw; if no token is left, says why and what to change.

        Args:
            mask: overwritten.
            num_new: new tokens of the sequence before this draw.
            output: the new tokens that the host knows; all `num_new` where `needs_last_token`.
            matcher: this sequence's progress, if there is a grammar.
        """
        ends = None
        if matcher is None:
            mask[:] = self._base
        else:
            if (why := matcher.fill(output, mask)) is not None:
                return why
            ends = mask & self._ends
            mask &= self._base
        if num_new < self._min_tokens:
            clear(mask, self._stop_ids)
        for prefix, last in self._phrases:
            if tuple(output[-len(prefix) :]) == prefix:
                clear(mask, (last,))
        if ends is not None and num_new >= self._min_tokens and not mask.any():
            mask[:] = ends
        return None if mask.any() else self._why_empty(num_new)

    def _why_empty(self, num_new: int) -> str:
        ways_out = dict(self._ways_out)
        if num_new < self._min_tokens:
            ends = f"min_tokens={self._min_tokens} (no token may end the output earlier)"
            ways_out[ends] = "lower min_tokens"
        return f"{' and '.join(ways_out)} leave no token to draw: {' or '.join(ways_out.values())}"
