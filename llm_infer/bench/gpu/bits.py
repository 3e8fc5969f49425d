"""Section of the GPU run: with numerics="invariant" a token has the same bits alone, in company, in chunks, preempted, from
cached pages, with proposals, in several steps at once, and scored as a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_infer.bench.gpu.section import Row, Setting
from llm_infer.bench.gpu.tokens import SHAPE, prompt_logprobs, small_model
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.features import StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.load import LoadedModel
from llm_infer.scheduler.request import Sequence

WIDE = dict(num_hidden_layers=4)  # layers as wide as published
MODELS: dict[str, tuple[str, str, int, dict[str, int]]] = {
    "float32": ("llama-3.1-8b", "float32", 16, SHAPE),
    "bfloat16": ("llama-3.1-8b", "bfloat16", 64, WIDE),
    "bfloat16, windows and soft-caps": ("gemma-2-2b", "bfloat16", 16, SHAPE),
    "bfloat16, windows, sinks and experts": ("gpt-oss-20b", "bfloat16", 64, SHAPE),
}
"""Name → architecture, dtype, page size, what is changed of its sizes."""
LENGTHS = 7, 40, 150, 300, 33, 64, 129, 500
NEW = 32
Bits = list[tuple[int, float]]


def bits(setting: Setting) -> Iterator[Row]:
    """Compares with each prompt alone; `ok` where all tokens and log-probabilities are equal. On a CPU nothing is promised."""
    for name, (architecture, dtype, page_size, sizes) in list(MODELS.items())[: 1 if setting.small else None]:
        model = small_model(architecture, dtype, sizes)
        for numerics in ("auto",) if setting.small else ("invariant", "auto"):
            if setting.seconds_left <= 0:
                return
            for row in compare(model, page_size, numerics, LENGTHS[:2] if setting.small else LENGTHS):
                promised = numerics == "invariant"
                yield {"model": name, "numerics": numerics, "ok": row["equal"] == 1 if promised else None} | row


def compare(model: LoadedModel, page_size: int, numerics: str, lengths: tuple[int, ...]) -> Iterator[Row]:
    """Yields for each setting the share of tokens with the same bits as alone, and the largest difference."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 1000, length).tolist() for length in lengths]

    def engine(chunk: int, buckets: tuple[int, ...], **more: Any) -> Engine:
        few = more.pop("few_pages", False)
        pages = sum(-(-(length + 4) // page_size) for length in lengths) + 2 if few else None
        steps = more.pop("steps", 1)
        limits = SchedulerConfig(len(lengths), chunk, 1024, num_scheduler_steps=steps)
        cache = CacheConfig(page_size, pages, None if few else 1 << 28)
        made = Engine(model, EngineConfig(cache=cache, scheduler=limits, numerics=numerics, **more))
        made.runner.buckets = buckets  # few programs to compile
        made.levels = [StepFeatures.LOGPROBS | StepFeatures.PROMPT_LOGPROBS]
        return made

    first = engine(1024, (16, 1024))
    expected = [_answers(first, [prompt])[0] for prompt in prompts]

    def row(company: str, found: list[Bits]) -> Row:
        pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
        largest = max(abs(a[1] - b[1]) for a, b in pairs)
        equal = float(np.mean([a == b for a, b in pairs]))
        return {"company": company, "tokens": len(pairs), "equal": equal, "largest difference": largest}

    yield row("scored as prompts", _scores(first, prompts, expected))
    yield row("together, from cached pages", _answers(first, prompts))
    speculative = SpeculativeConfig(method="ngram", num_speculative_tokens=4)
    chunks = engine(64, (16, 64), speculative=speculative, few_pages=True)
    yield row("together, in chunks of 64, preempted, with proposals", _answers(chunks, prompts))
    yield row("the same, scored as prompts", _scores(chunks, prompts, expected))
    yield row("several steps at once", _answers(engine(256, (16, 256), steps=4), prompts))


def _answers(engine: Engine, prompts: list[list[int]]) -> list[Bits]:
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=0)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    found: dict[Sequence, Bits] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.logprobs is not None
            found.setdefault(event.sequence, []).append((event.token_id, event.logprobs.logprob))
    return [found[request.sequences[0]] for request in requests]


def _scores(engine: Engine, prompts: list[list[int]], answers: list[Bits]) -> list[Bits]:
    """Reads each answer as the end of a prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    whole = [prompt + [token for token, _ in answer] for prompt, answer in zip(prompts, answers, strict=True)]
    requests = [engine.add_request(ids, params) for ids in whole]
    while engine.has_work:
        engine.step()
    return [
        list(zip(ids[len(prompt) :], prompt_logprobs(request)[len(prompt) - 1 :], strict=True))
        for request, prompt, ids in zip(requests, prompts, whole, strict=True)
    ]
