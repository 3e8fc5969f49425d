"""Groups of layers that remember the same tokens: which layers share pages, and how many pages a sequence needs."""

from __future__ import annotations

from dataclasses import dataclass

MOST_GROUPS = 8
"""Each has a block table of its own, which steps carry."""

Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class PageGroups:
    """The layers of a model by what they remember.

    All pages of a pool are equal: a page holds a run of tokens for as many layers as the largest group has, and belongs to
    one group of one sequence at a time. So memory goes where it is needed: a layer that sees everything keeps a page for
    every run of tokens, one with a window gives pages back when it has left them behind.

    Attributes:
        windows: of each group: the tokens that its layers see, or None if they see all.
        layers: of each group: its layers, in the order in which they lie in a page.
    """

    windows: Windows
    layers: tuple[tuple[int, ...], ...]

    @property
    def depth(self) -> int:
        """Layers in a page."""
        return max(map(len, self.layers))

    def places(self) -> tuple[list[int], list[int]]:
        """Returns the group of each layer, and its place in the pages of the group."""
        found = {layer: (g, i) for g, layers in enumerate(self.layers) for i, layer in enumerate(layers)}
        groups, places = zip(*(found[layer] for layer in range(len(found))), strict=True)
        return list(groups), list(places)


def one_group(num_layers: int) -> PageGroups:
    """Puts all layers into one group that keeps everything."""
    return PageGroups((None,), (tuple(range(num_layers)),))


def group_layers(windows: Windows, num_layers: int, max_model_len: int, ahead: int) -> PageGroups:
    """Divides layers into groups of equal windows and, but for the last of each kind, equal size.

    The size is the one with which a sequence of full length takes the least memory: with more layers in a page the smaller
    kind's pages have room that nobody uses, with fewer there are more groups. Too many kinds make one group of all.

    Args:
        windows: of each layer; empty where all see everything.
        num_layers: L.
        max_model_len: longest sequence in tokens: a larger window hides nothing.
        ahead: see `tokens_kept`.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows or (None,) * num_layers):
        kept = tokens_kept(window, max_model_len, ahead)
        kinds.setdefault(window if kept < max_model_len else None, []).append(layer)

    def cut(size: int) -> PageGroups:
        parts = [(w, tuple(of[i : i + size])) for w, of in kinds.items() for i in range(0, len(of), size)]
        return PageGroups(*zip(*parts, strict=True))

    def cost(groups: PageGroups) -> int:
        return groups.depth * sum(tokens_kept(window, max_model_len, ahead) for window in groups.windows)

    if len(kinds) > MOST_GROUPS:
        return one_group(num_layers)
    sizes = range(max(map(len, kinds.values())), 0, -1)
    return min((each for each in map(cut, sizes) if len(each.windows) <= MOST_GROUPS), key=cost)


def tokens_kept(window: int | None, length: int, ahead: int) -> int:
    """Returns how many of `length` tokens a layer holds at most, if steps are `ahead` tokens further than is known for good."""
    return length if window is None else min(length, window + ahead)


def pages_at_most(windows: Windows, length: int, page_size: int, ahead: int) -> int:
    """Counts the pages that a sequence of so many tokens holds at most at a time."""
    return sum(_pages(window, length, page_size, ahead) for window in windows)


def _pages(window: int | None, length: int, page_size: int, ahead: int) -> int:
    pages = -(-length // page_size)
    return pages if window is None else min(pages, -(-(window + ahead) // page_size) + 1)


def first_kept(window: int | None, position: int, page_size: int) -> int:
    """Returns the index of the first page that a token at `position`, or a later one, sees."""
    return 0 if window is None else max(0, position - window + 1) // page_size
