"""States of fixed size, one to a page of a pool of their own: who has which, and snapshots that prefixes go on from."""

from __future__ import annotations

from collections.abc import Sequence

from llm_infer.kvcache.page_allocator import InvariantError, PageAllocator


class States:
    """Pages with the state of recurrent layers behind some token of a sequence, counted as those of keys and values.

    A step reads a row's state from a page and writes it to one: the same, or a new one where the old state is still wanted by a
    fork, by another beam, or as a snapshot. So nothing is copied on the device. A snapshot is the state behind a full page of
    tokens, known by the digest of that page (`PrefixCache.extend`); one that no sequence uses is given up when pages are short,
    the one that was used longest ago first.

    Args:
        num_pages: of one shard, the null page included, which takes what nobody reads.
        num_shards: data-parallel shards.

    Attributes:
        allocator: counts the owners.
    """

    def __init__(self, num_pages: int, num_shards: int) -> None:
        self.allocator = PageAllocator(num_pages, num_shards)
        self._page_of: list[dict[bytes, int]] = [{} for _ in range(num_shards)]
        self._digest_of: list[dict[int, bytes]] = [{} for _ in range(num_shards)]
        self.allocator.on_evict(self._forget)

    def longest(self, shard: int, digests: Sequence[bytes]) -> int:
        """Counts the pages of the longest of these prefixes behind which there is a snapshot."""
        page_of = self._page_of[shard]
        return next((count for count in range(len(digests), 0, -1) if digests[count - 1] in page_of), 0)

    def adopt(self, shard: int, digest: bytes) -> int:
        """Returns the page of a snapshot; the caller becomes an owner."""
        page = self._page_of[shard][digest]
        self.allocator.share(shard, (page,))
        return page

    def insert(self, shard: int, digest: bytes, page: int) -> None:
        """Keeps a state as a snapshot; no effect if the digest is known."""
        if digest not in self._page_of[shard]:
            self.allocator.keep(shard, page)
            self._page_of[shard][digest] = page
            self._digest_of[shard][page] = digest

    def drop(self, shard: int, digest: bytes) -> None:
        """Gives a snapshot up; no effect if there is none."""
        page = self._page_of[shard].pop(digest, None)
        if page is not None:
            del self._digest_of[shard][page]
            self.allocator.give_back(shard, page)

    def clear(self) -> None:
        """Gives all snapshots up; to be called while no page is pinned."""
        for shard, page_of in enumerate(self._page_of):
            for digest in tuple(page_of):
                self.drop(shard, digest)

    def pages(self, shard: int) -> list[int]:
        """Returns the pages of snapshots, for `PageAllocator.check`."""
        page_of, digest_of = self._page_of[shard], self._digest_of[shard]
        if {page: digest for digest, page in page_of.items()} != digest_of:
            raise InvariantError(f"shard {shard}: snapshots {page_of} and their pages {digest_of} disagree")
        return list(digest_of)

    def _forget(self, shard: int, page: int) -> None:
        del self._page_of[shard][self._digest_of[shard].pop(page)]
