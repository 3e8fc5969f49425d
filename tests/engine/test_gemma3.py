"""Gemma 3 270M on its real weights gives the tokens of transformers: windows in five of six layers, five types of blocks.

The file is under Gemma's terms, so it is not fetched: LLM_INFER_TEST_GEMMA3 is the path of google/gemma-3-270m as Q4_K_M.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.models.load import LoadedModel, compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights.gguf import GGUFFile
from llm_infer.weights.sources import resolve
from tests.engine.engines import EngineFactory, greedy
from tests.golden_tokens import CLOSE_CALL, assert_same_tokens, load_goldens

GIVEN = os.environ.get("LLM_INFER_TEST_GEMMA3", "")
pytestmark = pytest.mark.skipif(not Path(GIVEN).is_file(), reason="LLM_INFER_TEST_GEMMA3 is no file of Gemma 3 270M")
GOLDENS = load_goldens("gemma3")
ALL = range(len(GOLDENS.prompts))
LONG = [i for i in ALL if len(GOLDENS.prompts[i]) > 512]
MAX_FORCED = int((GOLDENS.margins < CLOSE_CALL).sum())


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(open_model(resolve(GIVEN)), stored=compute_dtype("auto", "exact")[1])


@pytest.fixture(scope="module")
def make_engine(model: LoadedModel) -> EngineFactory:
    return EngineFactory(model, max_num_seqs=16, num_pages=6 * 500, max_model_len=1152)


def test_the_goldens_say_something() -> None:
    assert len(ALL) >= 24 and len(LONG) == 6 and all(prompt[0] == 2 for prompt in GOLDENS.prompts)
    assert np.mean([len(set(tokens)) > 15 for tokens in GOLDENS.tokens.tolist()]) >= 0.5


def test_a_batch_and_again_from_the_prefix_cache(make_engine: EngineFactory) -> None:
    engine = make_engine(chunk=256)
    assert assert_same_tokens(GOLDENS, ALL, partial(greedy, engine)) <= MAX_FORCED
    assert engine.scheduler.prefix_cache is not None
    before = engine.scheduler.prefix_cache.num_hits
    assert assert_same_tokens(GOLDENS, LONG, partial(greedy, engine)) <= MAX_FORCED
    found = engine.scheduler.prefix_cache.num_hits - before
    assert found >= sum((len(GOLDENS.prompts[i]) - 1) // 16 * 16 for i in LONG)


def test_chunks_and_preemption(make_engine: EngineFactory) -> None:
    engine = make_engine(chunk=80, pages=6 * 50, cache=False)
    assert assert_same_tokens(GOLDENS, [*range(20), *LONG], partial(greedy, engine)) <= MAX_FORCED
    assert engine.scheduler.num_preemptions > 0


def test_alone_with_several_steps(make_engine: EngineFactory) -> None:
    engine = make_engine(chunk=256, seqs=1, cache=False, steps=4)
    assert assert_same_tokens(GOLDENS, [LONG[0], 7], partial(greedy, engine)) <= MAX_FORCED


def test_ids_are_those_of_llamacpp() -> None:
    """Six characters of a digest stand for the ids of each text (see make_vocabulary_goldens.py)."""
    folder = Path(__file__).parents[1] / "goldens"
    texts = json.loads((folder / "tokenizer_llamacpp.json").read_text(encoding="utf-8"))["texts"]
    digests = json.loads((folder / "gemma3_tokenizer.json").read_text())
    tokenizer = Tokenizer.from_gguf(GGUFFile(GIVEN).metadata)
    for special in (True, False):
        found = [tokenizer.encode(text, add_special_tokens=special, parse_special=special) for text in texts]
        short = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:6] for ids in found]
        assert short == digests[f"{special} {special}"].split()


def test_text_in_and_out() -> None:
    llm = LLM(GIVEN, max_model_len=256, max_num_seqs=1, progress=False)
    (result,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=16))
    assert result.prompt_token_ids[0] == 2
    assert list(result.outputs[0].token_ids) == GOLDENS.tokens[0][:16].tolist()
