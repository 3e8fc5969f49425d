"""The pages of one sequence in the order of its tokens, by group of layers, with fork and copy-on-write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llm_infer.kvcache.groups import Windows, first_kept
from llm_infer.kvcache.page_allocator import NULL_PAGE, PageAllocator


class PageTable:
    """Maps the positions `0 … length - 1` of a sequence to pages: position i lies in page `i // page_size` of each group.

    `length` counts the positions that have a place; the scheduler knows which of them are computed. Tables share pages
    after `fork` and `adopt`. A page with several owners is never written: `append` gives its writer a copy first
    (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", §4.3).

    Groups of layers with a window have places only up to `covered`, which `reserve` leaves behind, and only from the first
    position on that is still seen (`release_behind`): the null page stands for the pages before.

    Args:
        allocator: where pages come from.
        shard: data-parallel shard on which the sequence lives.
        page_size: tokens in a page.
        windows: of each group, see `PageGroups`.

    Attributes:
        groups: the pages of each group.
        has_windows: whether some group gives pages back.
    """

    __slots__ = ("_allocator", "_begins", "covered", "groups", "has_windows", "length", "page_size", "shard", "windows")

    def __init__(self, allocator: PageAllocator, shard: int, page_size: int, windows: Windows = (None,)) -> None:
        self._allocator = allocator
        self.shard = shard
        self.page_size = page_size
        self.windows = windows
        self.has_windows = windows != (None,) * len(windows)
        self.groups: list[list[int]] = [[] for _ in windows]
        self._begins = [0] * len(windows)
        self.length = self.covered = 0

    @property
    def pages(self) -> list[int]:
        """The pages of the first group."""
        return self.groups[0]

    def pages_needed(self, count: int) -> int:
        """Returns how many pages that `append(count)` would allocate, copies of shared pages included."""
        return self.pages_to(self.length + count)

    def pages_to(self, end: int) -> int:
        """Returns how many pages that `extend(end)` would allocate, copies of shared pages included."""
        return self._needed(end, end)

    def last_pages(self) -> list[tuple[int, int]]:
        """Returns the last page of each group and the number of its owners."""
        last = [pages[-1] for pages in self.groups]
        return [(page, self._allocator.refcount(self.shard, page)) for page in last]

    def append_in_place(self) -> bool:
        """Makes a place for one more token if that needs no page (the common case of a decode step); else False."""
        length = self.length
        if length % self.page_size == 0 or self.covered < length:
            return False
        groups, refcount = self.groups, self._allocator.refcount
        if refcount(self.shard, groups[0][-1]) > 1:
            return False
        if len(groups) > 1 and any(refcount(self.shard, pages[-1]) > 1 for pages in groups):
            return False
        self.length = self.covered = length + 1
        return True

    def append(self, count: int) -> list[tuple[int, int]]:
        """Makes places for `count` more tokens; see `extend`."""
        return self.extend(self.length + count)

    def extend(self, end: int) -> list[tuple[int, int]]:
        """Makes places in all groups up to position `end`, where there are none, in pages that this table alone owns.

        Returns:
            Pairs (source page, destination page) to copy on the device before the new places are written: one of each group
            where the first new place lies in a shared page, else none. Only the tokens before it matter in the copy.

        Raises:
            OutOfPages: then the table has not changed.
        """
        return self._grow(end, end)

    def reserve(self, count: int) -> list[tuple[int, int]]:
        """Makes places for `count` more tokens in groups that see everything; `extend` makes those of the others."""
        return self._grow(self.length + count, self.covered)

    def adopt(self, groups: Sequence[Sequence[int]]) -> None:
        """Starts an empty table with full pages that have owners already (found in the prefix cache)."""
        assert not any(self.groups), "only an empty table adopts pages"
        for index, pages in enumerate(groups):
            self._share(pages)
            self.groups[index] = list(pages)
            self._begins[index] = next((i for i, page in enumerate(pages) if page != NULL_PAGE), len(pages))
        self.length = self.covered = len(groups[0]) * self.page_size

    def fork(self, length: int | None = None) -> PageTable:
        """Returns a second table over the first `length` tokens (all by default), which shares their pages."""
        child = PageTable(self._allocator, self.shard, self.page_size, self.windows)
        child.length = self.length if length is None else length
        child.covered = min(self.covered, child.length)
        assert child.length <= self.length, f"fork of {child.length} tokens from a table of {self.length}"
        keep = -(-child.length // self.page_size)
        child.groups = [pages[:keep] for pages in self.groups]
        child._begins = list(self._begins)
        for pages in child.groups:
            self._share(pages)
        return child

    def truncate(self, length: int) -> None:
        """Forgets the places from `length` on and gives back the pages that only they used."""
        assert 0 <= length <= self.length, f"truncate to {length} tokens of {self.length}"
        keep = -(-length // self.page_size)
        for index, pages in enumerate(self.groups):
            self._release(pages[keep:])
            del pages[keep:]
            self._begins[index] = min(self._begins[index], keep)
        self.length, self.covered = length, min(self.covered, length)

    def release_behind(self, position: int) -> None:
        """Gives back the pages that no token at `position` or later sees."""
        for index, window in enumerate(self.windows):
            begin, end = self._begins[index], first_kept(window, position, self.page_size)
            if end > begin:
                pages = self.groups[index]
                self._release(pages[begin:end])
                pages[begin:end] = [NULL_PAGE] * (end - begin)
                self._begins[index] = end

    def prefix(self, count: int) -> list[list[int]] | None:
        """Returns the first `count` pages of each group as `adopt` takes them; None where one of them is given back."""
        found = []
        for pages, window in zip(self.groups, self.windows, strict=True):
            first = first_kept(window, count * self.page_size, self.page_size)
            if NULL_PAGE in pages[first:count]:
                return None
            found.append([NULL_PAGE] * first + pages[first:count])
        return found

    def held(self) -> list[int]:
        """Returns all pages that this table owns."""
        return [page for pages in self.groups for page in pages if page != NULL_PAGE]

    def free(self) -> None:
        """Gives back all pages."""
        self.truncate(0)

    def ends(self, length: int | None = None, covered: int | None = None) -> list[int]:
        """Returns the position where each group's places end, or would if `length` and `covered` were so."""
        length, covered = self.length if length is None else length, self.covered if covered is None else covered
        return [length if window is None else covered for window in self.windows]

    def _growing(self, length: int, covered: int) -> Iterable[tuple[list[int], int, int]]:
        """Yields the pages of each group that is to grow, the position where its places end, and where they shall end."""
        for pages, end, new_end in zip(self.groups, self.ends(), self.ends(length, covered), strict=True):
            if new_end > end:
                yield pages, end, new_end

    def _shares_last(self, pages: list[int], end: int) -> bool:
        return end % self.page_size > 0 and self._allocator.refcount(self.shard, pages[-1]) > 1

    def _needed(self, length: int, covered: int) -> int:
        needed = 0
        for pages, end, new_end in self._growing(length, covered):
            needed += -(-new_end // self.page_size) - len(pages) + self._shares_last(pages, end)
        return needed

    def _grow(self, length: int, covered: int) -> list[tuple[int, int]]:
        copies, needed = [], self._needed(length, covered)
        if needed:
            new = self._allocator.allocate(self.shard, needed)
            for pages, end, new_end in self._growing(length, covered):
                if self._shares_last(pages, end):
                    source, pages[-1] = pages[-1], new.pop()
                    self._allocator.release(self.shard, (source,))
                    copies.append((source, pages[-1]))
                while len(pages) < -(-new_end // self.page_size):
                    pages.append(new.pop())
        self.length = max(length, self.length)
        self.covered = max(covered, self.covered) if self.has_windows else self.length
        return copies

    def _share(self, pages: Sequence[int]) -> None:
        self._allocator.share(self.shard, [page for page in pages if page != NULL_PAGE])

    def _release(self, pages: Sequence[int]) -> None:
        self._allocator.release(self.shard, [page for page in pages if page != NULL_PAGE])
