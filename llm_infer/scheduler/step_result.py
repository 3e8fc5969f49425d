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
        page_size: tokens in a page.
    """

    __slots__ = ("after_rows", "books", "candidates", "events", "finish", "next_step", "page_size")

    def __init__(self, books: Books, finish: Callable[[Sequence, str], None], next_step: int) -> None:
        self.books, self.finish, self.next_step = books, finish, next_step
        self.candidates: dict[Sequence, SequenceOf[tuple[int, float]]] = {}
        self.events: list[TokenEvent] = []
        self.after_rows: list[Callable[[], None]] = []
        self.page_size = books.page_size

    def offer_pages(self, sequence: Sequence, computed: int) -> None:
        """Offers pages that are full of the first `computed` tokens of a sequence, and gives back those that nothing behind
        them sees; of one that still runs."""
        if sequence.status is not Status.RUNNING:
            return
        full = computed // self.page_size
        if full > sequence.num_cached_pages:
            self.books.offer_pages(sequence, full)
        assert sequence.table is not None
        # Beams that wait to return will share what this one has computed, from where they part.
        if sequence.table.has_windows and all(member.status is Status.RUNNING for member in sequence.group):
            sequence.table.release_behind(computed)
