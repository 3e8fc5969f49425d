"""The pages of one sequence in the order of its tokens, with fork and copy-on-write."""

from __future__ import annotations

from llm_infer.kvcache.page_allocator import PageAllocator


class PageTable:
    """Maps the positions `0 … length - 1` of a sequence to pages: position i lies in `pages[i // page_size]`.

    `length` counts the positions that have a place; the scheduler knows which of them are computed. Tables share pages
    after `fork` and `adopt`. A page with several owners is never written: `append` gives its writer a copy first
    (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", §4.3).

    Args:
        allocator: where pages come from.
        shard: data-parallel shard on which the sequence lives.
        page_size: tokens in a page.
    """

    __slots__ = ("_allocator", "length", "page_size", "pages", "shard")

    def __init__(self, allocator: PageAllocator, shard: int, page_size: int) -> None:
        self._allocator = allocator
        self.shard = shard
        self.page_size = page_size
        self.pages: list[int] = []
        self.length = 0

    def pages_needed(self, count: int) -> int:
        """Returns how many pages that `append(count)` would allocate, a copy of a shared page included."""
        offset = self.length % self.page_size
        shared = offset > 0 and self._allocator.refcount(self.shard, self.pages[-1]) > 1
        return -(-(self.length + count) // self.page_size) - len(self.pages) + shared

    def refcount_of_last(self) -> int:
        """Returns the number of owners of the last page."""
        return self._allocator.refcount(self.shard, self.pages[-1])

    def append_in_place(self) -> bool:
        """Makes a place for one more token if that needs no page (the common case of a decode step); else False."""
        if self.length % self.page_size == 0 or self._allocator.refcount(self.shard, self.pages[-1]) > 1:
            return False
        self.length += 1
        return True

    def append(self, count: int) -> list[tuple[int, int]]:
        """Makes places for `count` more tokens, in pages that this table alone owns.

        Returns:
            Pairs (source page, destination page) to copy on the device before the new places are written: one if the
            first new place lies in a shared page, else none. Only the tokens before it matter in the copy.

        Raises:
            OutOfPages: then the table has not changed.
        """
        needed = self.pages_needed(count)
        if needed == 0:
            self.length += count
            return []
        shared = self.length % self.page_size > 0 and self._allocator.refcount(self.shard, self.pages[-1]) > 1
        self.pages += self._allocator.allocate(self.shard, needed)
        self.length += count
        if not shared:
            return []
        source = self.pages.pop(-needed - 1)
        self._allocator.release(self.shard, (source,))
        return [(source, self.pages[-needed])]

    def adopt(self, pages: list[int]) -> None:
        """Starts an empty table with full pages that have owners already (found in the prefix cache)."""
        assert not self.pages, "only an empty table adopts pages"
        self._allocator.share(self.shard, pages)
        self.pages = list(pages)
        self.length = len(pages) * self.page_size

    def fork(self, length: int | None = None) -> PageTable:
        """Returns a second table over the first `length` tokens (all by default), which shares their pages."""
        child = PageTable(self._allocator, self.shard, self.page_size)
        child.length = self.length if length is None else length
        assert child.length <= self.length, f"fork of {child.length} tokens from a table of {self.length}"
        child.pages = self.pages[: -(-child.length // self.page_size)]
        self._allocator.share(self.shard, child.pages)
        return child

    def truncate(self, length: int) -> None:
        """Forgets the places from `length` on and gives back the pages that only they used."""
        assert 0 <= length <= self.length, f"truncate to {length} tokens of {self.length}"
        keep = -(-length // self.page_size)
        self._allocator.release(self.shard, self.pages[keep:])
        del self.pages[keep:]
        self.length = length

    def free(self) -> None:
        """Gives back all pages."""
        self.truncate(0)
