"""Groups of layers with windows: which layers share a page, which pages are given back, what the prefix cache still knows."""

from __future__ import annotations

import random

import pytest

from llm_infer.base.errors import RequestError
from llm_infer.kvcache.groups import PageGroups, group_layers, pages_at_most
from llm_infer.kvcache.page_allocator import NULL_PAGE, PageAllocator
from llm_infer.kvcache.page_table import PageTable
from llm_infer.kvcache.prefix_cache import PrefixCache
from llm_infer.models.architectures import architecture_config, architecture_names
from tests.host.fake_device import FakeEngine

LONG = 32_768


def groups_of(name: str, length: int = LONG, ahead: int = 1024) -> PageGroups:
    config = architecture_config(name)
    return group_layers(config.windows, config.num_layers, min(length, config.max_position_embeddings), ahead)


@pytest.mark.parametrize(
    ("name", "depth", "full", "windows"),
    [
        ("gemma-3-270m", 3, 1, 5),  # 3 layers that see all, 15 with a window
        ("gemma-3-1b", 4, 1, 6),
        ("gemma-3-27b", 10, 1, 6),
        ("gpt-oss-20b", 12, 1, 1),
        ("olmo-3-7b", 8, 1, 3),
        ("llama-3.1-8b", 32, 1, 0),
    ],
)
def test_groups_of_published_models(name: str, depth: int, full: int, windows: int) -> None:
    groups = groups_of(name)
    assert groups.depth == depth
    assert groups.windows.count(None) == full and len(groups.windows) == full + windows


@pytest.mark.parametrize("name", architecture_names())
def test_every_layer_has_a_place_in_a_group_of_its_window(name: str) -> None:
    config, groups = architecture_config(name), groups_of(name)
    group_of, place_of = groups.places()
    assert len(set(zip(group_of, place_of, strict=True))) == config.num_layers
    assert max(place_of) < groups.depth and len(groups.windows) <= 8
    for layer, group in enumerate(group_of):
        assert groups.layers[group][place_of[layer]] == layer
        assert groups.windows[group] in (None, config.windows[layer] if config.windows else None)


def test_windows_that_hide_nothing_make_no_group() -> None:
    assert groups_of("gemma-3-1b", length=512) == PageGroups((None,), (tuple(range(26)),))
    assert groups_of("gemma-3-1b", length=1536).windows == (None,), "nothing is given back before steps are ahead"
    assert group_layers((4,) * 3, 3, 64, 8) == PageGroups((4,), ((0, 1, 2),))


def test_a_table_gives_back_what_the_window_has_left_behind() -> None:
    allocator = PageAllocator(40)
    table = PageTable(allocator, 0, 4, (None, 6))
    table.append(20)
    assert [len(pages) for pages in table.groups] == [5, 5]
    table.release_behind(13)  # which sees 8 … 13
    assert [pages.count(NULL_PAGE) for pages in table.groups] == [0, 2]
    child = table.fork(14)
    assert child.append(1) == [(table.groups[0][3], child.groups[0][3]), (table.groups[1][3], child.groups[1][3])]
    assert table.prefix(3) is None and table.prefix(4) == [table.groups[0][:4], [0, 0, *table.groups[1][2:4]]]
    allocator.check([[table.held(), child.held()]])
    for each in (table, child):
        each.free()
    assert allocator.num_free(0) == 39


def test_places_of_windows_are_made_later() -> None:
    table = PageTable(PageAllocator(40), 0, 4, (None, 6))
    table.reserve(20)
    assert [len(pages) for pages in table.groups] == [5, 0] and table.pages_to(7) == 2
    table.extend(7)
    assert (table.length, table.covered, len(table.groups[1])) == (20, 7, 2)
    assert not table.append_in_place() and table.pages_needed(1) == 1 + 4
    table.append(1)
    assert (table.length, table.covered, len(table.groups[1])) == (21, 21, 6)


def test_a_prefix_is_known_if_each_group_has_what_it_sees() -> None:
    allocator = PageAllocator(60)
    cache = PrefixCache(allocator, 4, (None, 6))
    table = PageTable(allocator, 0, 4, (None, 6))
    table.append(24)
    digests = [bytes([i]) for i in range(6)]
    for group, pages in enumerate(table.groups):
        for digest, page in zip(digests, pages, strict=True):
            if group == 0 or digest not in (digests[1], digests[4]):
                cache.insert(0, digest, page, group)
    full, window = table.groups
    # 24 sees the pages 4 and 5, 20 the pages 3 and 4, 16 the pages 2 and 3: there they are.
    assert cache.lookup(0, digests) == [full[:4], [0, 0, *window[2:4]]]
    assert cache.lookup(0, digests[:3]) == [full[:1], window[:1]]
    again = PageTable(allocator, 0, 4, (None, 6))
    again.adopt(cache.lookup(0, digests))
    again.append(3)
    assert (again.length, len(again.held())) == (19, 5 + 3)
    allocator.check([[table.held(), again.held(), cache.pages(0)]])


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-27b"])
def test_a_long_context_holds_a_quarter_of_the_bytes(name: str) -> None:
    groups, layers, chunk = groups_of(name, ahead=1024), architecture_config(name).num_layers, 512
    engine = FakeEngine(
        windows=groups.windows,
        page_size=16,
        num_pages=8 * LONG // 16,
        max_model_len=LONG,
        max_num_batched_tokens=chunk,
        overlap=True,
        check=False,
    )
    request = engine.add([i % 5 for i in range(LONG - 8)], max_tokens=4)
    most = 0
    while not request.finished:
        engine.step()
        table = request.sequences[0].table
        if table is not None:
            most = max(most, len(table.held()))
    assert most <= pages_at_most(groups.windows, LONG, 16, 2 * chunk)
    assert most * groups.depth <= 0.25 * layers * (LONG // 16)


def test_more_kinds_than_groups_are_one_group() -> None:
    assert group_layers(tuple(range(1, 10)), 9, 1024, 8).windows == (None,)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("window", [2, 3])
def test_beams_return_from_a_preemption_where_windows_have_left_their_beginning_behind(
    window: int, cache: bool
) -> None:
    draw = random.Random(28)
    engine = FakeEngine(
        windows=(None, window),
        page_size=4,
        num_pages=43,  # just enough for the beams alone
        max_model_len=80,
        max_num_seqs=4,
        max_num_batched_tokens=4,
        enable_prefix_caching=cache,
        overlap=False,
    )
    engine.add([draw.randint(0, 2) for _ in range(50)], max_tokens=25, ignore_eos=True)
    engine.add([draw.randint(0, 2) for _ in range(37)], beam_width=3, max_tokens=14, ignore_eos=True)
    engine.run(20_000)
    assert engine.scheduler.num_preemptions > 0
    for request in engine.requests:
        engine.verify(request)


def test_beams_need_no_more_memory_than_with_one_group() -> None:
    limits = {"max_model_len": 2048, "max_num_batched_tokens": 128, "page_size": 16}
    for groups in (1, 6):
        windows = (None, *(512,) * (groups - 1))
        engine = FakeEngine(windows=windows, num_pages=1 + 39 * groups, **limits)
        engine.add([1] * 500, beam_width=4, max_tokens=20)
        with pytest.raises(
            RequestError, match="pages of 16 tokens" + (", in 6 groups of layers" if groups > 1 else ";")
        ):
            FakeEngine(windows=windows, num_pages=39 * groups, **limits).add([1] * 500, beam_width=4, max_tokens=20)
