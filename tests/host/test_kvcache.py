"""Page allocator, page tables and prefix cache, each on its own."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from llm_infer.kvcache.page_allocator import InvariantError, OutOfPages, PageAllocator
from llm_infer.kvcache.page_table import PageTable
from llm_infer.kvcache.prefix_cache import PrefixCache


def filled(allocator: PageAllocator, length: int, page_size: int = 4, shard: int = 0) -> PageTable:
    table = PageTable(allocator, shard, page_size)
    table.append(length)
    return table


def test_allocator_hands_out_every_page_once_but_never_the_null_page() -> None:
    allocator = PageAllocator(num_pages=6, num_shards=2)
    pages = allocator.allocate(1, 5)
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert (allocator.num_free(0), allocator.num_free(1)) == (5, 0)
    with pytest.raises(OutOfPages, match="shard 1: 1 pages more than the 0 free"):
        allocator.allocate(1, 1)
    allocator.check([[], [pages]])
    allocator.share(1, pages[:2])
    allocator.release(1, pages)
    assert allocator.num_free(1) == 3
    allocator.check([[], [pages[:2]]])


def test_failed_allocation_changes_nothing() -> None:
    allocator = PageAllocator(4)
    table = filled(allocator, 8)
    with pytest.raises(OutOfPages):
        table.append(8)
    assert (table.length, len(table.pages), allocator.num_free(0)) == (8, 2, 1)
    allocator.check([[table.pages]])


def test_misuse_is_noticed() -> None:
    allocator = PageAllocator(4)
    with pytest.raises(InvariantError, match="page 2 is released but has no owner"):
        allocator.release(0, [2])
    with pytest.raises(InvariantError, match="page 2 has no owner"):
        allocator.share(0, [2])
    with pytest.raises(ValueError, match="num_pages=1"):
        PageAllocator(1)


def test_check_prints_both_sides() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(0, 2)
    with pytest.raises(InvariantError, match=rf"differ: {{{min(pages)}: \(1, 0\)}}"):
        allocator.check([[[max(pages)]]])
    allocator._free[0].append(3)
    with pytest.raises(InvariantError, match=r"free \+ referenced = 2 \+ 2 = 4, but there are 3 pages"):
        allocator.check([[pages]])
    allocator._free[0] = [pages[0]]
    with pytest.raises(InvariantError, match="both free and owned"):
        allocator.check([[pages]])


def test_pinned_page_is_not_handed_out() -> None:
    allocator = PageAllocator(4)
    first, second, third = allocator.allocate(0, 3)
    cache = PrefixCache(allocator, 4)
    cache.insert(0, b"digest", second)
    allocator.pin(0, first)
    allocator.pin(0, second)
    allocator.release(0, [first, second])
    assert allocator.num_available(0) == 0
    with pytest.raises(OutOfPages):
        allocator.allocate(0, 1)
    allocator.unpin_all()
    assert (allocator.num_free(0), allocator.num_available(0)) == (1, 2)
    allocator.check([[[third], cache.pages(0)]])


def test_append_opens_pages_as_they_are_needed() -> None:
    table = filled(PageAllocator(9), 3)
    sizes = []
    for _ in range(6):
        assert table.pages_needed(1) == (table.length % 4 == 0)
        assert table.append(1) == []
        sizes.append(len(table.pages))
    assert sizes == [1, 2, 2, 2, 2, 3]
    assert table.pages_needed(16) == 4
    table.truncate(5)
    assert (table.length, len(table.pages)) == (5, 2)
    table.free()
    assert (table.length, table.pages) == (0, [])


@pytest.mark.parametrize("length", [3, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_fork_shares_all_and_copies_the_partial_page_on_write(length: int, count: int) -> None:
    allocator = PageAllocator(20)
    parent = filled(allocator, length)
    child = parent.fork()
    assert child.pages == parent.pages and allocator.num_free(0) == 19 - len(parent.pages)
    before, needed = list(parent.pages), child.pages_needed(count)
    copies = child.append(count)
    partial = length % 4 > 0
    assert copies == ([(before[-1], child.pages[len(before) - 1])] if partial else [])
    assert needed == 19 - len(before) - allocator.num_free(0) == len(child.pages) - len(before) + partial
    assert parent.pages == before and child.pages[: length // 4] == before[: length // 4]
    assert parent.append(1) == [], "the last owner writes in place"
    allocator.check([[parent.pages, child.pages]])


def test_append_in_place_only_into_a_page_of_its_own() -> None:
    allocator = PageAllocator(9)
    parent = filled(allocator, 4)
    assert not parent.append_in_place(), "a page is needed"
    parent.append(1)
    child = parent.fork()
    assert not parent.append_in_place(), "the page is shared"
    child.free()
    assert parent.append_in_place() and parent.length == 6


def test_fork_of_a_beginning() -> None:
    allocator = PageAllocator(9)
    parent = filled(allocator, 12)
    child = parent.fork(7)
    assert (child.length, child.pages) == (7, parent.pages[:2])
    assert child.append(1) == [(parent.pages[1], child.pages[1])]
    allocator.check([[parent.pages, child.pages]])


def test_digests_chain_tokens_and_salt() -> None:
    cache = PrefixCache(PageAllocator(4), 4)
    tokens = [1, 2, 3, 2**31 - 1, 5, 6, 7, 8, 9]

    def digests(tokens: list[int], salt: str | None = None) -> list[bytes]:
        result: list[bytes] = []
        cache.extend(result, tokens, len(tokens) // 4, salt)
        return result

    parent = hashlib.sha256(b"").digest()
    expected = []
    for page in (tokens[:4], tokens[4:8]):
        parent = hashlib.sha256(parent + np.array(page, "<i4").tobytes()).digest()
        expected.append(parent)
    assert digests(tokens) == expected
    assert digests([0, *tokens[1:]])[1] != expected[1], "a page's digest depends on what comes before"
    assert not set(digests(tokens, "a")) & set(expected) and digests(tokens, "") != expected


def test_lookup_gives_the_longest_known_prefix_of_its_shard() -> None:
    allocator = PageAllocator(9, num_shards=2)
    cache = PrefixCache(allocator, 4)
    table = filled(allocator, 12, shard=1)
    digests = [b"a", b"b", b"c"]
    for digest, page in zip(digests, table.pages, strict=True):
        cache.insert(1, digest, page)
    assert cache.lookup(1, digests) == [table.pages]
    assert cache.lookup(1, [b"a", b"x", b"c"]) == [table.pages[:1]]
    assert cache.lookup(0, digests) == [[]]
    allocator.check([[], [table.pages, cache.pages(1)]])


def test_same_tokens_in_another_page_are_not_kept_twice() -> None:
    allocator = PageAllocator(9)
    cache = PrefixCache(allocator, 4)
    first, second = filled(allocator, 4), filled(allocator, 4)
    cache.insert(0, b"a", first.pages[0])
    cache.insert(0, b"a", second.pages[0])
    assert cache.pages(0) == first.pages
    second.free()
    assert allocator.num_free(0) == 7


def test_eviction_takes_the_least_recently_used_and_ends_before_beginnings() -> None:
    allocator = PageAllocator(7)
    cache = PrefixCache(allocator, 4)
    old, new = filled(allocator, 12), filled(allocator, 12)
    for name, table in ((b"o", old), (b"n", new)):
        for index, page in enumerate(table.pages):
            cache.insert(0, name + bytes([index]), page)
    old_digests, new_digests = ([name + bytes([i]) for i in range(3)] for name in (b"o", b"n"))
    old_pages = list(old.pages)
    old.free()
    new.free()
    assert (allocator.num_free(0), allocator.num_available(0), allocator.num_idle(0, old_pages)) == (0, 6, 3)
    again = PageTable(allocator, 0, 4)
    again.adopt(cache.lookup(0, old_digests[:1]))  # used again: now the most recent
    again.free()
    taken = allocator.allocate(0, 3)
    assert [len(cache.lookup(0, digests)[0]) for digests in (old_digests, new_digests)] == [1, 2]
    in_use = PageTable(allocator, 0, 4)
    in_use.adopt(cache.lookup(0, new_digests))
    taken += allocator.allocate(0, 1)
    assert cache.lookup(0, old_digests) == [[]] and cache.lookup(0, new_digests) == [in_use.pages]
    with pytest.raises(OutOfPages, match="the prefix cache can give back 0"):
        allocator.allocate(0, 1)
    allocator.check([[taken, in_use.pages, cache.pages(0)]])


def test_a_long_life_of_evictions_stays_fast_and_balanced() -> None:
    allocator = PageAllocator(33)
    cache = PrefixCache(allocator, 1)
    for index in range(2000):
        table = filled(allocator, 1 + index % 5, page_size=1)
        for position, page in enumerate(table.pages):
            cache.insert(0, index.to_bytes(4, "little") + bytes([position]), page)
        table.free()
    assert allocator.num_available(0) == 32
    allocator.check([[cache.pages(0)]])
