"""Sections of the GPU run: the whole engine with random weights of Llama 3.1 8B, and with layers of models with experts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.bench.gpu.section import Row, Setting
from llm_infer.bench.rates import measure
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.engine.engine import Engine
from llm_infer.models.architectures import read_architecture
from llm_infer.models.load import dummy_model
from llm_infer.models.registry import family


class Measured(NamedTuple):
    """An engine with all programs that the batches need, and what to measure: tokens of a prompt, and new ones; `weights` are
    the bytes that each step reads."""

    engine: Engine
    batches: tuple[int, ...]
    prompt: int
    new: int
    weights: int


EXPERTS = {"gpt-oss-20b": 12, "qwen3-30b-a3b": 12}
"""Architecture → layers of it that fit beside the pages."""


def make_engine(
    setting: Setting, name: str = "llama-3.1-8b", layers: int | None = None, numerics: str = "auto"
) -> Measured:
    """Starts the engine with an architecture, or with its first layers."""
    architecture = read_architecture(name)
    if layers is not None:
        architecture["num_hidden_layers"] = layers
    batches, prompt, new = ((1, 16, 64, 256), 512, 128)
    limits = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=2048)
    page_size, memory = 64, 24 << 30
    if setting.small:
        sizes = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4)
        architecture |= {**sizes, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
        batches, prompt, new = ((1, 2), 12, 4)
        limits = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=128)
        page_size, memory = 16, 1 << 22
    config = family(architecture).config(architecture, fused_qkv=True)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = dummy_model(config, dtype)
    cache = CacheConfig(page_size=page_size, memory_bytes=memory, enable_prefix_caching=False)
    engine = Engine(model, EngineConfig(cache=cache, scheduler=limits, numerics=numerics))
    # Compiling a program for each power of two would take longer than measuring.
    buckets = {engine.runner.bucket_of(n) for n in (*batches, limits.max_num_batched_tokens)}
    engine.runner.buckets = tuple(sorted(buckets))
    for _ in engine.warm_up().compiled(threads=8):
        pass
    weights = sum(x.nbytes for name, x in model.params.items() if name != "embed.weight")
    return Measured(engine, batches, prompt, new, weights)


def experts(setting: Setting) -> Iterator[Row]:
    """Measures the same with models with experts, of which a step of few sequences reads some."""
    for name, layers in EXPERTS.items():
        for row in throughput(setting, name, layers):
            yield {"model": name, "layers": layers} | row


def invariant(setting: Setting) -> Iterator[Row]:
    """Measures the same with the same bits for a token in any company; a CPU has them anyhow."""
    yield from throughput(setting, numerics="auto" if jax.default_backend() == "cpu" else "invariant")


def throughput(
    setting: Setting, name: str = "llama-3.1-8b", layers: int | None = None, numerics: str = "auto"
) -> Iterator[Row]:
    """Measures prefill and decode tokens per second through `Engine`, and the step's share of the weights' roofline."""
    started = time.monotonic()
    engine, batches, prompt, new, weights = make_engine(setting, name, layers, numerics)
    yield {"batch": "all", "start s": time.monotonic() - started, "programs": len(engine.runner.buckets)}
    rng = np.random.default_rng(0)
    for batch in batches:
        if setting.seconds_left <= 0:
            return
        measure(engine, rng, batch, prompt, 4)
        found = measure(engine, rng, batch, prompt, new)
        step = found["tpot_s"]
        yield {
            "batch": batch,
            "prompt": prompt,
            "new": new,
            "decode tok/s": found["decode_tok_s"],
            "prefill tok/s": found["prefill_tok_s"],
            "total tok/s": found["total_tok_s"],
            "step ms": None if step is None else 1e3 * step,
            "weights GB/s": None if step is None else weights / step / 1e9,
            "host ms": sum(found[f"{part}_ms_per_step"] for part in ("schedule", "prepare", "dispatch", "commit")),
            "compiled late": engine.runner.times.compiles_after_warmup,
        }
