"""Counts pages that parallel samples and beams hold, beside those they must hold, which is computed without page tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

from llm_infer.decoding.beam import Child
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.scheduler.scheduler import Scheduler
from llm_infer.scheduler.strategies.beams import Beams

T = TypeVar("T")
WIDTHS = (2, 4, 6)


def pages_of_samples(num_prompt: int, num_new: int, n: int, page_size: int) -> int:
    """Returns the number of pages of `n` samples of a prompt that all draw `num_new` tokens.

    They share the pages before the last prompt token, which each sample computes for itself; the last new token is drawn but
    not computed.
    """
    shared = (num_prompt - 1) // page_size
    return shared + n * (-(-(num_prompt + num_new - 1) // page_size) - shared)


class Genealogy:
    """The descent of beams, as the search decides it; every computed token is a node of a tree.

    Args:
        num_prompt: tokens of the prompt, the trunk of the tree.
    """

    def __init__(self, num_prompt: int) -> None:
        self._nodes = count(num_prompt)
        self._beams = [list(range(num_prompt))]  # for each living beam, the nodes from the root to its last token

    def advance(self, children: Sequence[Child]) -> None:
        """Takes in the beams of the next step, each with one more token than its parent."""
        self._beams = [[*self._beams[child.parent], next(self._nodes)] for child in children]

    def pages(self, page_size: int) -> int:
        """Returns how many pages hold the living beams' tokens if equal beginnings are held once; a node tells all before it."""
        beams = self._beams
        return len({beam[min(end, len(beam)) - 1] for beam in beams for end in _page_ends(len(beam), page_size)})


@dataclass(frozen=True, slots=True)
class Held:
    """Most pages that a request holds.

    Attributes:
        found: pages that the scheduler had handed out.
        expected: pages by the closed form (samples), or by the genealogy of the run (beams).
        separate: pages of as many sequences that share nothing.
    """

    found: int
    expected: int
    separate: int

    @property
    def saved(self) -> float:
        """The saved share of the pages of separate sequences, in percent."""
        return 100 * (1 - self.found / self.separate)


def pages_in_use(scheduler: Scheduler) -> int:
    """Returns the number of pages that the first shard cannot hand out now."""
    return scheduler.allocator.num_usable - scheduler.allocator.num_available(0)


@contextmanager
def at_each_plan(scheduler: Scheduler, look: Callable[[], T]) -> Iterator[list[T]]:
    """Collects what `look` returns after each plan that is made meanwhile."""
    found: list[T] = []
    schedule = scheduler.schedule

    def watched() -> object:
        if (plan := schedule()) is not None:
            found.append(look())
        return plan

    scheduler.schedule = watched  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        scheduler.schedule = schedule


def samples(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Held:
    """Runs a request of `params.n` samples, which nothing may end early, alone."""
    with at_each_plan(engine.scheduler, lambda: pages_in_use(engine.scheduler)) as used:
        engine.add_request(prompt, params)
        _finish(engine)
    size, new = engine.scheduler.page_size, params.max_tokens
    assert new is not None and params.ignore_eos and not params.stop_token_ids
    expected = pages_of_samples(len(prompt), new, params.n, size)
    return Held(max(used), expected, params.n * pages_of_samples(len(prompt), new, 1, size))


def beams(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[Held]:
    """Runs a beam search alone; returns the pages of each of its steps."""
    size, width = engine.scheduler.page_size, params.beam_width
    request = engine.add_request(prompt, params)
    assert isinstance(request.strategy, Beams) and width is not None
    search, tree = request.strategy.search, Genealogy(len(prompt))
    advance = search.advance

    def recorded(*args: object) -> list[Child] | None:
        children = advance(*args)  # type: ignore[arg-type]
        if children is not None:
            tree.advance(children)
        return children

    search.advance = recorded  # type: ignore[method-assign,assignment]
    separate = lambda: width * -(-request.sequences[0].num_computed // size)  # noqa: E731
    look = lambda: Held(pages_in_use(engine.scheduler), tree.pages(size), separate())  # noqa: E731
    with at_each_plan(engine.scheduler, look) as steps:
        _finish(engine)
    return steps


def table(engine: Engine, prompt: Sequence[int], num_new: int) -> Iterator[str]:
    """Yields the lines of a table: samples and beams of each of WIDTHS, alone in the engine."""
    yield f"  {len(prompt)} + {num_new} tokens, most pages   in use   expected   separate    saved"
    draw = SamplingParams(seed=1, max_tokens=num_new, ignore_eos=True)
    search = SamplingParams(beam_width=2, max_tokens=num_new, ignore_eos=True)
    for width in WIDTHS:
        yield _line(f"{width} samples (closed form)", samples(engine, prompt, replace(draw, n=width)))
    for width in WIDTHS:
        most = max(beams(engine, prompt, replace(search, beam_width=width)), key=lambda held: held.found)
        yield _line(f"{width} beams (genealogy)", most)


def _line(name: str, held: Held) -> str:
    return f"  {name:<28}{held.found:>11}{held.expected:>11}{held.separate:>11}{held.saved:>8.1f} %"


def _finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def _page_ends(length: int, page_size: int) -> range:
    return range(page_size, length + page_size, page_size)
