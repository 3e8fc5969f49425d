"""Whether a waiting sequence fits, on which shard, and which of its pages are there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llm_infer.kvcache.groups import pages_at_most
from llm_infer.kvcache.page_allocator import NULL_PAGE
from llm_infer.scheduler.books import Books
from llm_infer.scheduler.request import Sequence, Status


@dataclass(frozen=True, slots=True)
class Admission:
    """Looks at the books of all shards and changes nothing.

    Attributes:
        books: where the sequences and their pages are.
        watermark: pages that stay free when a sequence is admitted beside others.
    """

    books: Books
    watermark: int

    def find(self, sequence: Sequence, shards: Iterable[int]) -> tuple[int, list[list[int]]] | None:
        """Finds the best of `shards` on which a sequence fits, and its cached pages there; None if it fits on none.

        A shard is good if it has much of the prefix and many pages left: a whole hit weighs as much as an empty pool.
        """
        allocator, page_size = self.books.allocator, self.books.page_size
        of_others: list[list[int]] | None = [[] for _ in self.books.windows]
        # Those have pages of a position, but no state behind it.
        if sequence.table is None and self.books.states is None:
            found = sequence.request.strategy.pages_of_others(sequence, page_size)
            if found is None:
                return None
            of_others = found or of_others
        best, place = 0.0, None
        for shard in sorted(shards):
            if not self.books.has_slot(sequence, shard):
                continue
            cached = max(of_others, self._lookup(sequence, shard), key=lambda groups: len(groups[0]))
            # The others of its group wait for this one.
            num_running = len(self.books.running[shard])
            num_running -= sum(member.status is Status.RUNNING for member in sequence.group)
            if self._fits(sequence, shard, cached, num_running):
                hit = len(cached[0]) * page_size / len(sequence.tokens)
                score = 1 + hit + allocator.num_available(shard) / allocator.num_usable
                score -= 1e-6 * num_running  # a tie goes to the shard with fewer sequences
                if score > best:
                    best, place = score, (shard, cached)
        return place

    def num_uncached(self, sequence: Sequence) -> int:
        """Counts the tokens of a waiting sequence that no shard's prefix cache has."""
        cached = max(len(self._lookup(sequence, shard)[0]) for shard in range(len(self.books.running)))
        return len(sequence.tokens) - cached * self.books.page_size

    def _lookup(self, sequence: Sequence, shard: int) -> list[list[int]]:
        """Returns cached pages for a sequence without pages. Its last token is always computed, to have logits to draw from."""
        cache = self.books.prefix_cache
        request = sequence.request
        if cache is None or sequence.table is not None or request.whole_prompt or request.uncached:
            return [[] for _ in self.books.windows]
        left = 1 + request.strategy.num_joint(sequence)
        full = (len(sequence.tokens) - left) // self.books.page_size
        cache.extend(sequence.digests, sequence.tokens, full, request.cache_salt, request.weights)
        found = cache.lookup(shard, sequence.digests[:full])
        states = self.books.states
        while states is not None and (known := states.longest(shard, sequence.digests[: len(found[0])])) < len(
            found[0]
        ):
            found = cache.lookup(shard, sequence.digests[:known])
        return found

    def _fits(self, sequence: Sequence, shard: int, cached: list[list[int]], num_running: int) -> bool:
        """Tells whether all its pages are there, and beside other sequences the watermark and a page for each of them to grow.

        The second part bounds preemption: between an admission and the next shortage every sequence can fill a page.
        """
        books = self.books
        allocator, length = books.allocator, len(sequence.tokens)
        if sequence.table is not None:
            needed = sequence.table.pages_needed(length - sequence.table.length)
        else:
            pages, needed = -(-length // books.page_size), 0
            for window, found in zip(books.windows, cached, strict=True):
                missing = pages - len(found)
                # A group with a window gets its pages chunk by chunk and gives some back; beams keep them for each other.
                if window is not None and sequence.request.width == 1:
                    most = pages_at_most((window,), length, books.page_size, books.ahead)
                    missing = min(missing, most - len(found) + found.count(NULL_PAGE))
                needed += missing
        reserve = self.watermark + num_running * len(books.windows) if num_running else 0
        # Idle cached pages count as available until the sequence itself takes them.
        available = allocator.num_available(shard) - sum(allocator.num_idle(shard, pages) for pages in cached)
        return needed + reserve <= available
