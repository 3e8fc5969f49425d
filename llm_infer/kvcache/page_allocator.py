"""Reference-counted pages of the KV pool: who may write a page, who may hand it out again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

NULL_PAGE = 0


class OutOfPages(Exception):
    """A shard cannot give that many pages. Nothing was allocated."""


class InvariantError(AssertionError):
    """The books do not balance: a bug in this package, never a user's mistake."""


class PageAllocator:
    """Pages `1 … num_pages - 1` of every data-parallel shard, each with a count of its owners.

    An owner is a page table that lists the page, or the prefix cache that keeps it. A page is in exactly one state:
    free (no owner), idle (the cache is its only owner; it is taken back when the free list is empty, the one released
    longest ago first) or in use. Page 0 of each shard is the null page, which padding rows write to; it is never
    handed out. Page ids are local to their shard.

    Args:
        num_pages: pages of one shard, including the null page.
        num_shards: data-parallel shards.
    """

    def __init__(self, num_pages: int, num_shards: int = 1) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: expected at least 2, the null page and one to hand out")
        self.num_pages = num_pages
        self.num_shards = num_shards
        self._free = [list(range(num_pages - 1, 0, -1)) for _ in range(num_shards)]
        self._refcounts = [[0] * num_pages for _ in range(num_shards)]
        self._kept: list[set[int]] = [set() for _ in range(num_shards)]
        self._idle: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_shards)]
        self._pinned: list[set[int]] = [set() for _ in range(num_shards)]
        self._on_evict: Callable[[int, int], None] | None = None

    @property
    def num_usable(self) -> int:
        """Pages of one shard that can be handed out."""
        return self.num_pages - 1

    def num_free(self, shard: int) -> int:
        """Returns the number of pages without an owner."""
        return len(self._free[shard])

    def num_available(self, shard: int) -> int:
        """Returns how many pages `allocate` can give: free ones, and idle ones of the prefix cache."""
        return len(self._free[shard]) + len(self._idle[shard])

    def num_idle(self, shard: int, pages: Iterable[int]) -> int:
        """Returns how many of `pages` have only the prefix cache as their owner."""
        idle = self._idle[shard]
        return sum(page in idle for page in pages)

    def refcount(self, shard: int, page: int) -> int:
        """Returns the number of owners of a page."""
        return self._refcounts[shard][page]

    def allocate(self, shard: int, count: int) -> list[int]:
        """Gives `count` pages with one owner each.

        Raises:
            OutOfPages: fewer are available; then nothing has changed.
        """
        free = self._free[shard]
        if count > len(free):
            self._evict(shard, count - len(free))
        pages = [free.pop() for _ in range(count)]
        refcounts = self._refcounts[shard]
        for page in pages:
            refcounts[page] = 1
        return pages

    def share(self, shard: int, pages: Iterable[int]) -> None:
        """Adds one owner to each page. Every page must have one already."""
        refcounts, idle = self._refcounts[shard], self._idle[shard]
        for page in pages:
            if refcounts[page] < 1:
                raise InvariantError(f"shard {shard}: page {page} has no owner and cannot be shared")
            refcounts[page] += 1
            idle.pop(page, None)

    def release(self, shard: int, pages: Sequence[int]) -> None:
        """Takes one owner from each page; a page without owners is free.

        Goes from the last page to the first, so that the cache gives back the end of a prefix before its beginning.
        """
        refcounts = self._refcounts[shard]
        for page in reversed(pages):
            if refcounts[page] < 1:
                raise InvariantError(f"shard {shard}: page {page} is released but has no owner")
            refcounts[page] -= 1
            if refcounts[page] <= 1 and page not in self._pinned[shard]:
                self._settle(shard, page)

    def pin(self, shard: int, page: int) -> None:
        """Keeps a page from being handed out until `unpin_all`, even if it loses its last owner.

        The copies of one step run in any order: the source of one must not become the destination of another.
        """
        self._pinned[shard].add(page)

    def is_pinned(self, shard: int, page: int) -> bool:
        """Tells whether a page is kept from being handed out."""
        return page in self._pinned[shard]

    def unpin_all(self) -> None:
        """Ends every pin. Pages that lost their owners meanwhile become free or idle."""
        for shard, pinned in enumerate(self._pinned):
            while pinned:
                self._settle(shard, pinned.pop())

    def keep(self, shard: int, page: int) -> None:
        """Makes the prefix cache an owner of a page that is in use."""
        self.share(shard, (page,))
        self._kept[shard].add(page)

    def give_back(self, shard: int, page: int) -> None:
        """Ends the prefix cache's ownership of a page that it keeps; must be called while no page is pinned."""
        self._kept[shard].remove(page)
        self._idle[shard].pop(page, None)
        self.release(shard, (page,))

    def on_evict(self, forget: Callable[[int, int], None]) -> None:
        """Sets what is called with (shard, page) when an idle page is taken back from the prefix cache."""
        self._on_evict = forget

    def check(self, owners: Sequence[Iterable[Sequence[int]]]) -> None:
        """Checks the books against the real owners. Must be called while no page is pinned.

        Args:
            owners: `owners[shard]` gives one list of pages per owner.

        Raises:
            InvariantError: with both sides of the equation that does not hold.
        """
        for shard in range(self.num_shards):
            free, refcounts = self._free[shard], self._refcounts[shard]
            referenced = sum(count > 0 for count in refcounts)
            if len(free) + referenced != self.num_usable:
                raise InvariantError(
                    f"shard {shard}: free + referenced = {len(free)} + {referenced} = {len(free) + referenced}, "
                    f"but there are {self.num_usable} pages"
                )
            both = [page for page in set(free) if refcounts[page]]
            if both or len(set(free)) != len(free) or NULL_PAGE in free:
                raise InvariantError(f"shard {shard}: pages both free and owned {both}, free list {sorted(free)}")
            owned = Counter(page for pages in owners[shard] for page in pages)
            counted = {page: count for page, count in enumerate(refcounts) if count}
            if counted != dict(owned):
                wrong = {p: (counted.get(p, 0), owned[p]) for p in counted.keys() | owned.keys()}
                wrong = {p: pair for p, pair in sorted(wrong.items()) if pair[0] != pair[1]}
                raise InvariantError(f"shard {shard}: page: (reference count, number of owners) differ: {wrong}")
            idle = {page for page in self._kept[shard] if refcounts[page] == 1}
            if idle != self._idle[shard].keys():
                raise InvariantError(
                    f"shard {shard}: idle pages {sorted(self._idle[shard])}, "
                    f"pages owned by the prefix cache alone {sorted(idle)}"
                )

    def _settle(self, shard: int, page: int) -> None:
        """Files a page that has lost an owner: free, idle, or still in use."""
        count = self._refcounts[shard][page]
        if count == 0:
            self._free[shard].append(page)
        elif count == 1 and page in self._kept[shard]:
            self._idle[shard][page] = None

    def _evict(self, shard: int, count: int) -> None:
        idle = self._idle[shard]
        if count > len(idle):
            raise OutOfPages(
                f"shard {shard}: {count} pages more than the {len(self._free[shard])} free ones are needed, "
                f"the prefix cache can give back {len(idle)}"
            )
        for _ in range(count):
            page, _ = idle.popitem(last=False)
            self._kept[shard].remove(page)
            self._refcounts[shard][page] = 0
            self._free[shard].append(page)
            if self._on_evict is not None:
                self._on_evict(shard, page)
