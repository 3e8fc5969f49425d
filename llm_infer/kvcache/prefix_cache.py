"""Finds the pages of a prompt's beginning that an earlier sequence computed already."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from llm_infer.kvcache.groups import Windows, first_kept
from llm_infer.kvcache.page_allocator import NULL_PAGE, InvariantError, PageAllocator


class PrefixCache:
    """Full pages by the hash of every token up to their end.

    The hash of a page is SHA-256 over its parent's digest and its token ids as little-endian int32, so equal digests
    mean equal prefixes; the parent of the first page is the digest of the request's salt, so requests with different
    salts never share (nor learn by timing what others asked). The cache owns one reference to each of its pages;
    a page that nobody else owns is taken back by the allocator when it has no free one, least recently used first.

    Only full pages of committed steps are inserted and shared pages are never written, so no sequence reads a slot that
    another writes in the same step, as `paged_attention` demands (checked in `tests/host/fake_device.py`).

    Of a group of layers with a window only the pages count that the token behind a prefix sees; a prefix is known if all
    groups have what they need of it.

    Attributes:
        num_queries: prompt tokens that were looked up (counted when the sequence is admitted).
        num_hits: those of them that were found.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, windows: Windows = (None,)) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._windows = windows
        self._pack = struct.Struct(f"<{page_size}i").pack
        self._page_of: list[list[dict[bytes, int]]] = [[{} for _ in windows] for _ in range(allocator.num_shards)]
        self._place_of: list[dict[int, tuple[int, bytes]]] = [{} for _ in range(allocator.num_shards)]
        self.num_queries = 0
        self.num_hits = 0
        allocator.on_evict(self._forget)

    def extend(
        self, digests: list[bytes], tokens: Sequence[int], num_pages: int, salt: str | None, weights: int = 0
    ) -> None:
        """Appends to `digests` the digests of the pages of `tokens` until there are `num_pages`.

        `salt` is the request's; `weights` counts how often the model had got other weights when it came.
        """
        size = self._page_size
        for index in range(len(digests), num_pages):
            parent = digests[-1] if digests else _root(salt, weights)
            page = self._pack(*tokens[index * size : (index + 1) * size])
            digests.append(hashlib.sha256(parent + page).digest())

    def lookup(self, shard: int, digests: Sequence[bytes]) -> list[list[int]]:
        """Returns each group's pages of the longest known prefix, the null page for those that it does not need.

        The caller becomes an owner (`PageTable.adopt`) before it allocates.
        """
        groups = list(zip(self._page_of[shard], self._windows, strict=True))
        count = len(digests)
        for page_of, window in groups:
            if window is None:
                count = next((index for index in range(count) if digests[index] not in page_of), count)
        shorter = count
        while shorter is not None:
            count, shorter = shorter, None
            for page_of, window in groups:
                first = first_kept(window, count * self._page_size, self._page_size)
                missing = (
                    i for i in range(count - 1, first - 1, -1) if window is not None and digests[i] not in page_of
                )
                if (shorter := next(missing, None)) is not None:
                    break
        found = []
        for page_of, window in groups:
            first = first_kept(window, count * self._page_size, self._page_size)
            found.append([NULL_PAGE] * first + [page_of[digest] for digest in digests[first:count]])
        return found

    def count(self, queries: int, hits: int) -> None:
        """Adds to the counters, in tokens."""
        self.num_queries += queries
        self.num_hits += hits

    def insert(self, shard: int, digest: bytes, page: int, group: int = 0) -> None:
        """Keeps a full page of a group, computed and never written again; no effect if the digest is known."""
        page_of = self._page_of[shard][group]
        if digest not in page_of:
            self._allocator.keep(shard, page)
            page_of[digest] = page
            self._place_of[shard][page] = group, digest

    def clear(self) -> None:
        """Forgets everything; pages that sequences have stay theirs. To be called while no page is pinned."""
        for shard, places in enumerate(self._place_of):
            for page in places:
                self._allocator.give_back(shard, page)
            places.clear()
            for page_of in self._page_of[shard]:
                page_of.clear()

    def pages(self, shard: int) -> list[int]:
        """Returns the pages that the cache owns, for `PageAllocator.check`."""
        page_of, place_of = self._page_of[shard], self._place_of[shard]
        known = sum(map(len, page_of))
        if known != len(place_of) or any(page_of[group].get(d) != page for page, (group, d) in place_of.items()):
            raise InvariantError(f"shard {shard}: {known} digests for {len(place_of)} pages, or they disagree")
        return list(place_of)

    def _forget(self, shard: int, page: int) -> None:
        group, digest = self._place_of[shard].pop(page)
        del self._page_of[shard][group][digest]


def _root(salt: str | None, weights: int) -> bytes:
    named = b"" if salt is None else b"salt:" + salt.encode()
    return hashlib.sha256(named).digest() if weights == 0 else hashlib.sha256(b"weights:%d " % weights + named).digest()
