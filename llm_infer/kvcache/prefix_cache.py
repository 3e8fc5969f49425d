"""Finds the pages of a prompt's beginning that an earlier sequence computed already."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

from llm_infer.kvcache.page_allocator import InvariantError, PageAllocator


class PrefixCache:
    """Full pages by the hash of every token up to their end.

    The hash of a page is SHA-256 over its parent's digest and its token ids as little-endian int32, so equal digests
    mean equal prefixes; the parent of the first page is the digest of the request's salt, so requests with different
    salts never share (nor learn by timing what others asked). The cache owns one reference to each of its pages;
    a page that nobody else owns is taken back by the allocator when it has no free one, least recently used first.

    Only full pages of committed steps are inserted and shared pages are never written, so no sequence reads a slot that
    another writes in the same step, as `paged_attention` demands (checked in `tests/host/fake_device.py`).

    Attributes:
        num_queries: prompt tokens that were looked up (counted when the sequence is admitted).
        num_hits: those of them that were found.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._pack = struct.Struct(f"<{page_size}i").pack
        self._page_of: list[dict[bytes, int]] = [{} for _ in range(allocator.num_shards)]
        self._digest_of: list[dict[int, bytes]] = [{} for _ in range(allocator.num_shards)]
        self.num_queries = 0
        self.num_hits = 0
        allocator.on_evict(self._forget)

    def extend(self, digests: list[bytes], tokens: Sequence[int], num_pages: int, salt: str | None) -> None:
        """Appends to `digests` the digests of the pages of `tokens` until there are `num_pages`."""
        size = self._page_size
        for index in range(len(digests), num_pages):
            parent = digests[-1] if digests else _root(salt)
            page = self._pack(*tokens[index * size : (index + 1) * size])
            digests.append(hashlib.sha256(parent + page).digest())

    def lookup(self, shard: int, digests: Iterable[bytes]) -> list[int]:
        """Returns the pages of the longest known prefix. The caller becomes an owner (`PageTable.adopt`) before it allocates."""
        page_of = self._page_of[shard]
        pages = []
        for digest in digests:
            page = page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def count(self, queries: int, hits: int) -> None:
        """Adds to the counters, in tokens."""
        self.num_queries += queries
        self.num_hits += hits

    def insert(self, shard: int, digest: bytes, page: int) -> None:
        """Keeps a full page, computed and never written again; no effect if the digest is known."""
        if digest not in self._page_of[shard]:
            self._allocator.keep(shard, page)
            self._page_of[shard][digest] = page
            self._digest_of[shard][page] = digest

    def pages(self, shard: int) -> list[int]:
        """Returns the pages that the cache owns, for `PageAllocator.check`."""
        page_of, digest_of = self._page_of[shard], self._digest_of[shard]
        if len(page_of) != len(digest_of) or any(page_of.get(digest) != page for page, digest in digest_of.items()):
            raise InvariantError(f"shard {shard}: {len(page_of)} digests for {len(digest_of)} pages, or they disagree")
        return list(digest_of)

    def _forget(self, shard: int, page: int) -> None:
        del self._page_of[shard][self._digest_of[shard].pop(page)]


def _root(salt: str | None) -> bytes:
    return hashlib.sha256(b"" if salt is None else b"salt:" + salt.encode()).digest()
