"""What came back from a step, while the books take it in: for the strategies of its rows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from llm_infer.scheduler.books import Books
from llm_infer.scheduler.request import Sequence, Status, TokenEvent


class StepResult:
    """The result of one step.

    Args:
        books: where sequences and their pages are.
        finish: ends a sequence, with a reason.
        next_step: index of the first step that is not planned yet.

    Attributes:
        candidates: for the rows of beams, the most likely next tokens and their log-probabilities, best first.
        events: tokens for the user, so far.
        after_rows: what is to be done when all rows have been looked at.
    """

    __slots__ = ("_page_size", "after_rows", "books", "candidates", "events", "finish", "next_step")

    def __init__(self, books: Books, finish: Callable[[Sequence, str], None], next_step: int) -> None:
        self.books, self.finish, self.next_step = books, finish, next_step
        self.candidates: dict[Sequence, SequenceOf[tuple[int, float]]] = {}
        self.events: list[TokenEvent] = []
        self.after_rows: list[Callable[[], None]] = []
        self._page_size = books.page_size

    def append(self, sequence: Sequence, drawn: SequenceOf[int]) -> int:
        """Appends drawn tokens as far as the sequence goes, and ends it if it does; returns how many it has taken.

        All tokens before the last of them are computed; pages full of such tokens are offered to the prefix cache.
        """
        tokens, stop_ids, events, reason = sequence.tokens, sequence.stop_ids, self.events, None
        request, before = sequence.request, len(tokens)
        for token in drawn:
            tokens.append(token)
            if token in stop_ids and len(tokens) - len(request.prompt) >= request.sampling.min_tokens:
                reason = "stop"
            elif len(tokens) >= sequence.max_length:
                reason = "length"
            events.append(TokenEvent(sequence, token, reason))
            if reason is not None:
                break
        self.offer_pages(sequence, len(tokens) - 1)
        if reason is not None:
            self.finish(sequence, reason)
        return len(tokens) - before

    def offer_pages(self, sequence: Sequence, computed: int) -> None:
        """Offers pages that are full of the first `computed` tokens of a sequence; of one that still runs."""
        full = computed // self._page_size
        if full > sequence.num_cached_pages and sequence.status is Status.RUNNING:
            self.books.offer_pages(sequence, full)
