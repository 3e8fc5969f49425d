"""Beam search through pages and programs: the literal search on a tiny model, transformers' results on the default one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.base.errors import RequestError
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel, dummy_model, load_model
from llm_infer.models.opened import open_model
from llm_infer.models.params import merge_model
from llm_infer.scheduler.request import Request
from llm_infer.weights.sources import resolve
from tests.engine.engines import EngineFactory
from tests.models.family_checkpoints import dense_attend
from tests.naive_beam import Scores, naive_beam_search

CONFIG = ModelConfig("LlamaForCausalLM", 131, 32, 2, 4, 2, 16, 64, 256, tie_word_embeddings=True)
LENGTH = 96
COUNT = 14
STOPS = (3, 17, 40, 77)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def make_engine(model: LoadedModel) -> EngineFactory:
    return EngineFactory(model, max_num_seqs=8, num_pages=64, max_model_len=LENGTH)


@pytest.fixture(scope="module")
def scores(model: LoadedModel) -> Scores:
    """Log-probabilities of the next token by a full forward without pages."""

    @jax.jit
    def logprobs(ids: jax.Array, last: jax.Array) -> jax.Array:
        decoder = merge_model(model.definition, model.params)
        hidden, _ = decoder(ids, jnp.arange(LENGTH, dtype=jnp.int32), None, dense_attend)
        return jax.nn.log_softmax(decoder.logits(hidden[last][None])[0])

    @cache
    def of(tokens: tuple[int, ...]) -> np.ndarray:
        padded = np.zeros(LENGTH, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(logprobs(padded, len(tokens) - 1))

    return lambda tokens: of(tuple(tokens))


@pytest.fixture(scope="module")
def literal(scores: Scores) -> Callable[[list[int], SamplingParams], list[tuple[float, list[int]]]]:
    """What a search must give."""

    @cache
    def search(prompt: tuple[int, ...], params: SamplingParams) -> list[tuple[float, list[int]]]:
        assert params.beam_width is not None and params.max_tokens is not None
        return naive_beam_search(
            scores,
            list(prompt),
            width=params.beam_width,
            max_tokens=params.max_tokens,
            stop_ids=frozenset(params.stop_token_ids),
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
        )

    return lambda prompt, params: search(tuple(prompt), params)


def searches() -> list[tuple[list[int], SamplingParams]]:
    """Prompts around page boundaries, two with a common beginning, and all rules; stop ids end some beams early."""
    rng = np.random.default_rng(7)
    shared = rng.integers(1, 131, 21).tolist()
    own = [rng.integers(1, 131, n).tolist() for n in (1, 16, 17)] + [shared, [*shared, 5, 9]]
    rules = [(2, 1.0, False), (4, 0.0, "never"), (3, -1.0, True), (4, 2.0, "never"), (2, 0.5, True)]
    return [
        (
            prompt,
            SamplingParams(
                beam_width=width,
                length_penalty=penalty,
                early_stopping=early,
                max_tokens=COUNT - i,
                stop_token_ids=STOPS[: i % 3 * 2],
            ),
        )
        for i, (prompt, (width, penalty, early)) in enumerate(zip(own, rules, strict=True))
    ]


def run(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[Request]:
    requests = [engine.add_request(prompt, params) for prompt, params in asked]
    while engine.has_work:
        engine.step()
    engine.scheduler.check()
    assert engine.scheduler.usage(0) == 0.0, "pages are still in use although nothing runs"
    return requests


def check_results(request: Request, expected: list[tuple[float, list[int]]], tolerance: float) -> None:
    assert [beam.output for beam in request.sequences] == [tokens for _, tokens in expected]
    np.testing.assert_allclose(
        [b.score for b in request.sequences], [s for s, _ in expected], atol=tolerance, rtol=1e-4
    )


# chunk, sequences, pages, prefix cache, overlap, free-running requests beside the searches
ROWS = [
    (32, 8, 64, True, True, False),
    (8, 8, 64, False, False, True),
    (16, 8, 12, True, True, True),
    (8, 8, 11, False, True, True),
    (16, 4, 13, False, False, False),
]


@pytest.mark.parametrize(("chunk", "seqs", "pages", "cached", "overlap", "mixed"), ROWS)
def test_beams_equal_the_literal_search(
    make_engine: EngineFactory,
    literal: Callable[[list[int], SamplingParams], list[tuple[float, list[int]]]],
    chunk: int,
    seqs: int,
    pages: int,
    cached: bool,
    overlap: bool,
    mixed: bool,
) -> None:
    free = [([7 + i] * (3 + 9 * i), SamplingParams(temperature=0.9, seed=i, n=2, max_tokens=20)) for i in range(3)]
    alone = [[s.output for s in run(make_engine(cache=False), [pair])[0].sequences] for pair in free] if mixed else []
    engine = make_engine(chunk=chunk, seqs=seqs, pages=pages, cache=cached, overlap=overlap)
    for _ in range(2):  # the second time the prefix cache is filled
        asked = searches()
        if mixed:
            asked = [pair for both in zip(asked, [*free, *free], strict=False) for pair in both]
        requests = run(engine, asked)
        for request, (prompt, params) in zip(requests, asked, strict=True):
            if params.beam_width is None:
                assert [s.output for s in request.sequences] == alone[free.index((prompt, params))]
                continue
            check_results(request, literal(prompt, params), 1e-4)
    assert engine.scheduler.num_copied_pages > 0
    assert engine.scheduler.num_preemptions > 0 or pages == 64 or seqs == 4


def test_a_search_of_one_token_beside_logprobs(make_engine: EngineFactory) -> None:
    """Its only step has one row for all its results."""
    engine = make_engine()
    search = SamplingParams(beam_width=3, max_tokens=1)
    beams, other = run(engine, [([5, 6], search), ([7, 8], SamplingParams(temperature=0.0, max_tokens=2, logprobs=1))])
    (alone,) = run(make_engine(), [([5, 6], search)])
    assert [beam.output for beam in beams.sequences] == [beam.output for beam in alone.sequences]
    assert len(other.sequences[0].output) == 2
    engine.scheduler.check()


def test_parameters_that_make_no_sense_with_beams_are_refused(model: LoadedModel, make_engine: EngineFactory) -> None:
    for options in ({"n": 2}, {"top_k": 5}, {"logprobs": 2}, {"temperature": 0.5}, {"early_stopping": "soon"}):
        with pytest.raises(RequestError, match=next(iter(options))):
            SamplingParams(beam_width=4, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="length_penalty cannot be set without beam_width"):
        SamplingParams(length_penalty=2.0)
    with pytest.raises(RequestError, match="stop_token_ids"):
        make_engine().add_request([1], SamplingParams(beam_width=16, stop_token_ids=tuple(range(20))))


@pytest.mark.real
def test_the_default_model_gives_the_beams_of_transformers(default_gguf: Path) -> None:
    goldens = json.loads((Path(__file__).parent.parent / "goldens" / "smollm2_beams.json").read_text())
    loaded = load_model(open_model(resolve(str(default_gguf))))
    engine = EngineFactory(loaded, max_num_seqs=16, num_pages=200, max_model_len=128)(chunk=16)
    stops = frozenset({goldens["eos_token_id"]})
    engine.eos_token_ids = stops
    asked = [
        (
            one["prompt"],
            SamplingParams(
                beam_width=one["width"],
                length_penalty=one["length_penalty"],
                early_stopping=one["early_stopping"],
                max_tokens=one["max_tokens"],
            ),
        )
        for one in goldens["searches"]
    ]
    requests = run(engine, asked)
    reasons = [beam.finish_reason for request in requests for beam in request.sequences]
    for request, one in zip(requests, goldens["searches"], strict=True):
        check_results(request, list(zip(one["scores"], one["tokens"], strict=True)), 2e-3)
    assert {"stop", "length"} <= set(reasons)
