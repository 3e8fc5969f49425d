"""A token's log-probabilities have the same bits in any company, chunk, preemption, prefix hit and fork; decode = score."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_infer.base.errors import UserError
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.platform import why_not_invariant
from llm_infer.models.load import compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve
from tests.engine.engines import EngineFactory
from tests.golden_tokens import load_goldens
from tests.models.family_checkpoints import FOLDER
from tests.models.test_family_gguf import write_gguf

STORED = compute_dtype("auto", "exact")[1]
pytestmark = pytest.mark.skipif(STORED is None, reason="needs the native CPU kernels")
PAGE_SIZE = 16
COUNT = 5
"""Most likely tokens whose log-probabilities are compared."""

Bits = list[tuple[int, float, tuple[float, ...]]]
"""Of each token of an answer: its id, its log-probability and those of the most likely ones."""


def answers(engine: Engine, prompts: list[list[int]], tokens: int, **more: int) -> list[list[Bits]]:
    """Decodes greedily; returns the bits of each sample of each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=COUNT, **more)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    found: dict[object, Bits] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.logprobs is not None
            found.setdefault(event.sequence, []).append(
                (event.token_id, event.logprobs.logprob, tuple(event.logprobs.top_logprobs))
            )
    return [[found[sequence] for sequence in request.sequences] for request in requests]


def scores(engine: Engine, prompts: list[list[int]], bits: list[Bits]) -> list[Bits]:
    """Reads each answer as the end of a prompt; returns the bits of its tokens."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=COUNT, seed=0)
    whole = [prompt + [token for token, *_ in each] for prompt, each in zip(prompts, bits, strict=True)]
    requests = [engine.add_request(ids, params) for ids in whole]
    while engine.has_work:
        engine.step()
    return [
        [
            (ids[i], request.prompt_results[i].logprob, tuple(request.prompt_results[i].top_logprobs))
            for i in range(len(prompt), len(ids))
        ]
        for request, prompt, ids in zip(requests, prompts, whole, strict=True)
    ]


def settings(make: Callable[..., Engine], few_pages: int) -> Iterator[tuple[str, Engine]]:
    """Makes the engines of a pairwise set of what may differ."""
    yield "together, chunks of 16", make(chunk=16)
    yield "preempted", make(chunk=64, cache=False, pages=few_pages)
    yield "with proposals", make(chunk=64, speculative=SpeculativeConfig(num_speculative_tokens=3))
    yield "several steps at once", make(chunk=64, steps=4)


def check(make: Callable[..., Engine], prompts: list[list[int]], tokens: int) -> None:
    # All prompts fit, with a page for each to grow, but not all answers.
    few_pages = 1 + sum(-(-len(prompt) // PAGE_SIZE) + 1 for prompt in prompts)
    alone = make(chunk=64, seqs=1, cache=False, overlap=False)
    expected = [each for (each,) in answers(alone, prompts, tokens)]
    assert scores(alone, prompts, expected) == expected
    for name, engine in settings(make, few_pages):
        found = [each for (each,) in answers(engine, prompts, tokens)]
        assert found == expected, name
        one_group = len(engine.runner.step_programs.groups.windows) == 1
        assert name != "preempted" or engine.scheduler.num_preemptions > 0 or not one_group
        if engine.scheduler.prefix_cache is not None:  # once more, from its pages
            again = answers(engine, prompts, tokens, n=2)
            assert all(sample == one for samples, one in zip(again, expected, strict=True) for sample in samples), name
            assert engine.scheduler.prefix_cache.num_hits > 0 or not one_group
        assert scores(engine, prompts, expected) == expected, name


def test_the_documentation_lists_what_is_compared() -> None:
    text = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    table = text.split("## The same bits")[1].split("|---|---|\n")[1].split("\n\n")[0]
    compared = [name for name, _ in settings(lambda **options: None, 1)]  # type: ignore[arg-type,return-value]
    more = ["from cached pages, two samples", "the answer scored as a prompt"]
    assert table.splitlines() == [f"| {name} | every bit |" for name in (*compared, *more)]


@pytest.mark.real
def test_the_default_model(default_gguf: Path) -> None:
    model = load_model(open_model(resolve(str(default_gguf))), stored=STORED)
    make = EngineFactory(model, max_num_seqs=8, num_pages=200, max_model_len=512)
    prompts = load_goldens().prompts
    longest = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    check(make, [prompts[i] for i in (*longest[:1], 0, 3, 5, 7, 11)], 40)


def test_a_start_that_cannot_promise_it_says_why(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3_mha", "qwen3")
    opened = open_model(resolve(str(tmp_path / "model.gguf")))
    stored, dense = load_model(opened, stored=STORED), load_model(opened)
    limits = EngineConfig(CacheConfig(num_pages=8), SchedulerConfig(2, 16, 64), numerics="invariant")
    assert Engine(stored, limits).config.numerics == "invariant"
    with pytest.raises(UserError, match="numerics='invariant': XLA multiplies with some matrices"):
        Engine(dense, limits)
    with pytest.raises(UserError, match="numerics='fixed': expected one of auto, invariant"):
        EngineConfig(numerics="fixed")
    assert why_not_invariant(dense, "gpu") is None and "on TPUs" in str(why_not_invariant(dense, "tpu"))
    mesh = jax.sharding.Mesh(np.array([jax.devices()[0]] * 2), ("tp",))
    assert "over several devices" in str(why_not_invariant(replace(dense, mesh=mesh), "gpu"))


NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
FEW = ("gemma3_gqa",)


def check_tiny(source: Path) -> None:
    model = load_model(open_model(resolve(str(source))), stored=STORED)
    if model.smallest_batch > 1:
        pytest.skip("XLA multiplies with some of its matrices, whose rows are no multiple of 32 long")
    if model.config.moe is not None and jax.__version_info__ >= (0, 11):
        pytest.xfail("what XLA computes between the products of experts differs by a last bit now and then")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.config.vocab_size, size).tolist() for size in (37, 5, 15, 1, 24, 16)]

    @functools.cache
    def factory(chunk: int) -> EngineFactory:  # how layers are grouped depends on the size of chunks
        return EngineFactory(model, max_num_seqs=8, num_pages=60, max_model_len=64)

    check(lambda *, chunk, **options: factory(chunk)(chunk=chunk, **options), prompts, 24)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.sweep) for name in NAMES]
)
def test_tiny_models_in_bfloat16(name: str) -> None:
    check_tiny(FOLDER / name)


def test_tiny_models_in_float32(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3_mha", "qwen3")
    check_tiny(tmp_path / "model.gguf")


@pytest.mark.sweep
@pytest.mark.real
def test_the_default_model_in_every_setting(default_gguf: Path) -> None:
    """50 prompts × 64 tokens × {1, 8, 32 together} × {chunks of 16, 64, 512} × {cold, prefix hit, preempted}."""
    model = load_model(open_model(resolve(str(default_gguf))), stored=STORED)
    make = EngineFactory(model, max_num_seqs=32, num_pages=800, max_model_len=512)
    given = load_goldens().prompts
    prompts = [given[i % len(given)][(i // len(given)) * 2 :] or given[i % len(given)] for i in range(50)]
    expected: list[Bits] | None = None
    compared = 0
    for seqs, chunk, how in itertools.product((1, 8, 32), (16, 64, 512), ("cold", "prefix hit", "preempted")):
        few = how == "preempted" and seqs > 1
        engine = make(
            chunk=chunk,
            seqs=min(seqs, chunk),
            cache=how == "prefix hit",
            pages={8: 40, 16: 50, 32: 80}[min(seqs, chunk)] if few else None,
        )
        if how == "prefix hit":
            answers(engine, prompts, 2)
        found = [each for (each,) in answers(engine, prompts, 64)]
        expected = expected or found
        assert found == expected, (seqs, chunk, how)
        assert not few or engine.scheduler.num_preemptions > 0, (seqs, chunk)
        compared += sum(map(len, found))
    assert expected is not None and scores(make(chunk=512), prompts, expected) == expected
    print(f"{compared} tokens")
