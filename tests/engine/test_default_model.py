"""The default model's real weights through pages, scheduler and jitted steps give transformers' tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.runner import Runner
from llm_infer.models.load import LoadedModel, compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.scheduler.request import Request
from llm_infer.scheduler.scheduler import Scheduler
from llm_infer.weights.sources import resolve
from tests.engine.engines import EngineFactory, greedy
from tests.golden_tokens import assert_same_tokens, load_goldens

pytestmark = pytest.mark.real
GOLDENS = load_goldens()
ALL = range(len(GOLDENS.prompts))
LONG = [i for i in ALL if len(GOLDENS.prompts[i]) > 40]
MIXED = [*range(0, 24, 3), *LONG]
# One golden step has a margin below 1e-3; nothing else may need forcing.
MAX_FORCED = int((GOLDENS.margins < 2e-3).sum())


@pytest.fixture(scope="module")
def model(default_gguf: Path) -> LoadedModel:
    """As `LLM` loads it: in the blocks of the file where kernels multiply with them."""
    return load_model(open_model(resolve(str(default_gguf))), stored=compute_dtype("auto", "exact")[1])


@pytest.fixture(scope="module")
def make_engine(model: LoadedModel) -> EngineFactory:
    return EngineFactory(model, max_num_seqs=32, num_pages=400, max_model_len=512)


def test_a_whole_batch_and_again_from_the_prefix_cache(make_engine: EngineFactory) -> None:
    engine = make_engine(chunk=512)
    assert assert_same_tokens(GOLDENS, ALL, partial(greedy, engine)) <= MAX_FORCED
    assert engine.scheduler.prefix_cache is not None
    before = engine.scheduler.prefix_cache.num_hits
    assert assert_same_tokens(GOLDENS, LONG, partial(greedy, engine)) == 0
    found = engine.scheduler.prefix_cache.num_hits - before
    assert found >= sum((len(GOLDENS.prompts[i]) - 1) // 16 * 16 for i in LONG)


def test_chunks_of_16_without_prefix_cache(make_engine: EngineFactory) -> None:
    engine = make_engine(chunk=16, cache=False)
    assert assert_same_tokens(GOLDENS, MIXED, partial(greedy, engine)) <= MAX_FORCED


def test_forced_preemption_with_chunks_of_64(make_engine: EngineFactory) -> None:
    # The 12 sequences end with about 90 pages; 60 hold some of them at a time.
    engine = make_engine(chunk=64, pages=61)
    assert assert_same_tokens(GOLDENS, MIXED, partial(greedy, engine)) <= MAX_FORCED
    assert engine.scheduler.num_preemptions > 0


def test_alone_and_without_overlap(make_engine: EngineFactory) -> None:
    engine = make_engine(chunk=512, seqs=1, cache=False, overlap=False)
    assert assert_same_tokens(GOLDENS, [LONG[0], 7], partial(greedy, engine)) == 0


@pytest.mark.sweep
@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("seqs", [1, 24])
@pytest.mark.parametrize("pages", [61, 400])
def test_every_prompt_in_every_setting(
    make_engine: EngineFactory, chunk: int, cache: bool, seqs: int, pages: int
) -> None:
    engine = make_engine(chunk=chunk, cache=cache, seqs=min(seqs, chunk), pages=pages)
    assert assert_same_tokens(GOLDENS, ALL, partial(greedy, engine)) <= MAX_FORCED


def test_last_token_logits(model: LoadedModel) -> None:
    limits = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=1024, max_model_len=512)
    scheduler = Scheduler(limits, num_pages=400, page_size=16, max_model_len=512)
    config = EngineConfig(CacheConfig(num_pages=400), limits)
    runner = Runner(model, config, num_pages=400, max_model_len=512, keep_logits=True)
    for i in ALL:
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=1)
        scheduler.add(Request(str(i), GOLDENS.prompts[i], params))
    compared = 0
    while (plan := scheduler.schedule()) is not None:
        outputs = runner.submit(plan).read()
        for row, logits in zip(plan.rows[0], outputs["logits"][0], strict=False):
            if row.samples:
                i = int(row.sequence.request.request_id)
                np.testing.assert_allclose(logits[:: GOLDENS.stride], GOLDENS.last_logits[i], atol=2e-3, rtol=0)
                compared += 1
        scheduler.commit(plan, outputs["ids"].tolist())
    assert compared == len(ALL)
