"""Section of the GPU run: a small model's tokens and log-probabilities, from the engine here and on this machine's CPU.

`python -m llm_infer.bench.gpu.tokens ENGINES KINDS` (lists in JSON) prints those of the process's own platform as JSON.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.bench.gpu.section import Row, Setting
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.features import features_of
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.architectures import read_architecture
from llm_infer.models.load import LoadedModel, dummy_model
from llm_infer.models.registry import family

SHAPE = dict(num_hidden_layers=4, hidden_size=512, intermediate_size=1024, num_attention_heads=8, vocab_size=4096)
SHAPE |= dict(num_key_value_heads=2, head_dim=64)
WINDOW = 100
NGRAM = SpeculativeConfig(method="ngram", num_speculative_tokens=4)
ENGINES: dict[str, tuple[str, str, int, SpeculativeConfig | None]] = {
    "float32": ("llama-3.1-8b", "float32", 16, None),
    "bfloat16": ("llama-3.1-8b", "bfloat16", 64, None),
    "float32, n-gram": ("llama-3.1-8b", "float32", 64, NGRAM),
    "float32, windows and soft-caps": ("gemma-2-2b", "float32", 16, None),
    "float32, windows, sinks and experts": ("gpt-oss-20b", "float32", 16, NGRAM),
    "bfloat16, windows, sinks and experts": ("gpt-oss-20b", "bfloat16", 64, None),
}
"""Name → architecture (in SHAPE's sizes), dtype, page size, proposals."""
NEW = 24
REQUESTS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=1),
    "seeded": SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=1, max_tokens=NEW, ignore_eos=True),
    "samples": SamplingParams(temperature=1.0, min_p=0.02, n=3, seed=2, max_tokens=NEW, ignore_eos=True),
    "penalties": SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=NEW, ignore_eos=True),
    "beams": SamplingParams(temperature=0.0, beam_width=3, max_tokens=NEW, ignore_eos=True),
    "prompt logprobs": SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
}
PROMPTS = 7, 150, 300
"""Lengths: within a page, and longer than a step."""
NEAR = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference of a log-probability: of sums in another order, and of roundings to bfloat16. Those may send a token to
another expert, which changes it by more than 1: with experts the median counts."""


def tokens(setting: Setting) -> Iterator[Row]:
    """Compares both; `ok` where float32 gives the same tokens, and the log-probabilities of a prompt are near in both dtypes."""
    engines = list(ENGINES)[: 1 if setting.small else None]
    kinds = ["greedy", "prompt logprobs"] if setting.small else list(REQUESTS)
    with subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(engines), json.dumps(kinds)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as other:
        here = generate(engines, kinds)
        out, errors = other.communicate()
    if other.returncode:
        raise RuntimeError(errors[-3000:])
    expected = json.loads(out.splitlines()[-1])
    for name, results in here.items():
        for kind, found in results.items():
            wanted = expected[name][kind]
            row: Row = {"engine": name, "request": kind}
            if kind == "prompt logprobs":
                errors = np.abs(np.concatenate(found) - np.concatenate(wanted))
                chaotic = name.startswith("bfloat16") and name.endswith("experts")
                counts = np.median(errors) if chaotic else errors.max()
                yield row | {"ok": bool(counts <= NEAR[ENGINES[name][1]]), "error": float(errors.max())}
            else:
                same = float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))
                yield row | {"ok": same == 1 if name.startswith("float32") else None, "same": same}


def generate(engines: list[str], kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Returns engine → kind of request → token ids of each sequence, or log-probabilities of each prompt."""
    # A GPU would multiply float32 in fewer bits. Programs are compiled in other threads, which a context would not reach.
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        return {name: _generate(kinds, *ENGINES[name]) for name in engines}
    finally:
        jax.config.update("jax_default_matmul_precision", None)


def _generate(
    kinds: list[str], name: str, dtype: str, page_size: int, speculative: SpeculativeConfig | None
) -> dict[str, Any]:
    model = small_model(name, dtype)
    limits = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=128, max_model_len=512)
    cache = CacheConfig(page_size=page_size, memory_bytes=1 << 26)
    engine = Engine(model, EngineConfig(cache=cache, scheduler=limits, speculative=speculative))
    engine.runner.buckets = 16, 128  # few programs to compile: one for greedy requests, one for all others
    engine.levels = [functools.reduce(operator.or_, (features_of(REQUESTS[kind]) for kind in kinds))]
    results = {}
    for kind in kinds:
        params = REQUESTS[kind]
        rng = np.random.default_rng(0)  # the same prompts, so later kinds find their pages in the cache
        prompts = [rng.integers(10, 1000, length).tolist() for length in PROMPTS]
        requests = [engine.add_request(prompt, params) for prompt in prompts]
        while engine.has_work:
            engine.step()
        results[kind] = [
            prompt_logprobs(request) if kind == "prompt logprobs" else sequence.tokens[len(prompt) :]
            for request, prompt in zip(requests, prompts, strict=True)
            for sequence in request.sequences
        ]
    return results


def small_model(name: str, dtype: str, sizes: Mapping[str, int] = SHAPE) -> LoadedModel:
    """Makes a model of an architecture in these sizes, with short windows where it has any."""
    architecture = {**read_architecture(name), **sizes}
    if "sliding_window" in architecture:
        architecture["sliding_window"] = WINDOW
    return dummy_model(family(architecture).config(architecture, fused_qkv=True), jnp.dtype(dtype))


def prompt_logprobs(request: Any) -> list[float]:
    """Returns those of a prompt's tokens, the first left out."""
    return [entry.logprob for entry in request.prompt_results if entry is not None]


if __name__ == "__main__":
    print(json.dumps(generate(*map(json.loads, sys.argv[1:]))))
