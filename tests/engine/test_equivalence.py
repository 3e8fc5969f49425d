"""The same request gives the same tokens in every combination of engine features, equal to the naive full forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel, dummy_model
from llm_infer.models.params import merge_model
from tests.engine.engines import EngineFactory, greedy, run_all
from tests.models.family_checkpoints import dense_attend

CONFIG = ModelConfig("LlamaForCausalLM", 131, 32, 2, 4, 2, 16, 64, 256, tie_word_embeddings=True)
LENGTH = 96
COUNT = 20


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def make_engine(model: LoadedModel) -> EngineFactory:
    return EngineFactory(model, max_num_seqs=8, num_pages=64, max_model_len=LENGTH)


@pytest.fixture(scope="module")
def naive(model: LoadedModel) -> Callable[[list[int], int], tuple[list[int], float]]:
    """Greedy tokens by a full forward without pages for every token, and the smallest top-two margin on the way."""

    @jax.jit
    def logits(ids: jax.Array, last: jax.Array) -> jax.Array:
        decoder = merge_model(model.definition, model.params)
        hidden, _ = decoder(ids, jnp.arange(LENGTH, dtype=jnp.int32), None, dense_attend)
        return decoder.logits(hidden[last][None])[0]

    def run(prompt: list[int], count: int) -> tuple[list[int], float]:
        tokens, margin = list(prompt), np.inf
        for _ in range(count):
            padded = np.zeros(LENGTH, np.int32)
            padded[: len(tokens)] = tokens
            scores = np.asarray(logits(padded, len(tokens) - 1))
            first, second = np.sort(scores)[:-3:-1]
            margin = min(margin, float(first - second))
            tokens.append(int(scores.argmax()))
        return tokens[len(prompt) :], margin

    return run


def prompts() -> list[list[int]]:
    """Ragged lengths around page boundaries; half of them share a beginning of two pages and a bit."""
    rng = np.random.default_rng(5)
    shared = rng.integers(1, 131, 37).tolist()
    own = [rng.integers(1, 131, n).tolist() for n in (1, 2, 15, 16, 17, 33)]
    return own + [shared + rng.integers(1, 131, n).tolist() for n in (1, 5, 11, 12, 27)] + [shared]


# Pairwise over {chunk, running sequences, pages, prefix cache, overlap}: every pair of values is in some row.
ROWS = [
    # chunk seqs pages cache overlap
    (32, 8, 64, True, True),
    (32, 1, 64, False, False),
    (8, 8, 64, False, True),
    (8, 8, 9, True, False),
    (32, 8, 9, False, True),
    (8, 1, 9, True, True),
    (16, 3, 64, True, False),
    (16, 3, 9, False, True),
    (16, 8, 10, True, True),
    (8, 3, 10, False, False),
]


@pytest.mark.parametrize(("chunk", "seqs", "pages", "cache", "overlap"), ROWS)
def test_greedy_tokens_equal_the_naive_forward(
    make_engine: EngineFactory,
    naive: Callable[[list[int], int], tuple[list[int], float]],
    chunk: int,
    seqs: int,
    pages: int,
    cache: bool,
    overlap: bool,
) -> None:
    engine = make_engine(chunk=chunk, seqs=seqs, pages=pages, cache=cache, overlap=overlap)
    for _ in range(2):  # the second time the prefix cache is filled
        outputs = greedy(engine, prompts(), [COUNT] * len(prompts()))
        for prompt, output in zip(prompts(), outputs, strict=True):
            expected, margin = naive(prompt, COUNT)
            assert output == expected, f"prompt of {len(prompt)} tokens, smallest margin {margin:.2e}"
    # Short chunks spread the starts, so that even nine pages may suffice there.
    assert engine.scheduler.num_preemptions > 0 or pages > 9 or seqs == 1 or chunk == 8


def test_the_xla_kernels_give_the_same_tokens(
    model: LoadedModel, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(make_engine(chunk=16, seqs=3, pages=10), prompts(), [COUNT] * len(prompts()))
    monkeypatch.setenv("LLM_INFER_KERNELS", "paged_attention=xla,copy_pages=xla")
    through_xla = EngineFactory(model, max_num_seqs=8, num_pages=64, max_model_len=LENGTH)
    assert greedy(through_xla(chunk=16, seqs=3, pages=10), prompts(), [COUNT] * len(prompts())) == expected


@pytest.mark.parametrize(("chunk", "seqs", "pages", "cache", "overlap"), ROWS[:9:2])
def test_samples_share_pages_and_do_not_depend_on_the_batch(
    make_engine: EngineFactory, chunk: int, seqs: int, pages: int, cache: bool, overlap: bool
) -> None:
    draw = partial(SamplingParams, temperature=1.0, top_p=0.95, top_k=50, max_tokens=COUNT, n=3)
    params = [draw(seed=i) for i in range(len(prompts()))]
    alone = make_engine(chunk=32, cache=False, overlap=False)
    expected = [run_all(alone, [p], [param])[0] for p, param in zip(prompts()[3:8], params[3:8], strict=True)]
    copied = alone.scheduler.num_copied_pages
    engine = make_engine(chunk=chunk, seqs=seqs, pages=pages, cache=cache, overlap=overlap)
    assert run_all(engine, prompts(), params)[3:8] == expected
    assert copied > 0 and engine.scheduler.num_copied_pages > 0
    for samples in expected:
        assert samples[0] != samples[1] != samples[2] != samples[0]


def test_an_aborted_request_leaves_the_others_alone(make_engine: EngineFactory) -> None:
    wanted = greedy(make_engine(), prompts()[5:8], [COUNT] * 3)
    engine = make_engine()
    params = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
    requests = [engine.add_request(p, params, request_id=str(i)) for i, p in enumerate(prompts()[4:8])]
    for _ in range(6):
        engine.step()
    engine.abort("0")
    while engine.has_work:
        engine.step()
    assert [request.sequences[0].output for request in requests[1:]] == wanted
    assert engine.scheduler.usage(0) == 0.0
