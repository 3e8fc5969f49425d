"""Samples hold the pages of the closed form, beams those of the tree of what they are: counted beside the page tables."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from llm_infer.bench import pages
from llm_infer.decoding.beam import Child
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.models.load import dummy_model
from tests.engine.engines import EngineFactory
from tests.engine.test_speculation import CONFIG

SHAPES = ((1, 18), (9, 80), (16, 17), (17, 16), (33, 30), (40, 9))
"""Tokens of prompt and output: a last page that is full, has one token, or is in between, at either end."""


@pytest.fixture(scope="module")
def make_engine() -> EngineFactory:
    factory = EngineFactory(dummy_model(CONFIG, seed=3), max_num_seqs=6, num_pages=64, max_model_len=96)
    factory.buckets = (8,)
    return factory


def prompt(length: int) -> list[int]:
    return np.random.default_rng(1).integers(1, CONFIG.vocab_size, length).tolist()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("n", pages.WIDTHS)
def test_samples_hold_the_pages_of_the_closed_form(make_engine: EngineFactory, n: int, cached: bool) -> None:
    engine = make_engine(chunk=8, cache=cached)
    for length, new in SHAPES:
        held = pages.samples(engine, prompt(length), SamplingParams(n=n, seed=1, max_tokens=new, ignore_eos=True))
        assert held.found == held.expected <= held.separate == n * -(-(length + new - 1) // 16), (length, new)
    assert (
        pages.pages_of_samples(33, 30, 4, 16) == 2 + 4 * 2
    )  # 62 tokens each: two pages of the prompt, two of their own


@pytest.mark.parametrize("width", pages.WIDTHS)
def test_beams_hold_the_pages_of_their_tree_in_every_step(make_engine: EngineFactory, width: int) -> None:
    engine, dying = make_engine(chunk=8, cache=False), 0
    for length, new in SHAPES:
        search = SamplingParams(beam_width=width, max_tokens=new, ignore_eos=True, early_stopping="never")
        steps = pages.beams(engine, prompt(length), search)
        assert len(steps) == new + (length - 1) // 8
        assert [held.found for held in steps] == [held.expected for held in steps], (length, new)
        assert max(held.saved for held in steps) > 0 or length == 1
        dying += any(before.found > after.found for before, after in pairwise(steps))
    assert engine.scheduler.num_copied_pages > 0
    assert dying, "no beam died alone on a page, or its page did not come back"


def test_a_tree_counts_equal_beginnings_once() -> None:
    tree = pages.Genealogy(5)
    assert tree.pages(4) == 2
    tree.advance([Child(0, 7, 0.0), Child(0, 8, 0.0)])  # two beams: the first page is common, the second is not
    assert tree.pages(4) == 3
    tree.advance([Child(1, 7, 0.0), Child(1, 8, 0.0)])  # both come from the second one
    tree.advance([Child(0, 7, 0.0), Child(1, 8, 0.0)])  # the second page is full, but differs in its last two tokens
    assert tree.pages(4) == 3
    tree.advance([Child(0, 7, 0.0), Child(0, 8, 0.0)])  # now it is common, and each beam begins a third one
    assert tree.pages(4) == 4


def test_the_table_names_every_width(make_engine: EngineFactory) -> None:
    lines = list(pages.table(make_engine(chunk=8, cache=False), prompt(20), 14))
    assert len(lines) == 1 + 2 * len(pages.WIDTHS)
    assert lines[2].split()[:2] == ["4", "samples"] and lines[2].split()[-5:] == ["9", "9", "12", "25.0", "%"]
