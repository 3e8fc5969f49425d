"""Section of the GPU run: other paged-attention kernels on the same shapes, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from llm_infer.bench.gpu.kernels import DECODE, SMALL, Shape
from llm_infer.bench.gpu.section import Row, Setting, seconds_per_call


def attention(setting: Setting) -> Iterator[Row]:
    """Measures JAX's own decode kernel for paged attention, and FlashInfer's through PyTorch. Neither writes K and V."""
    for shape in SMALL[:1] if setting.small else DECODE:
        if setting.seconds_left <= 0:
            return
        yield _row(shape, "jax.experimental.pallas.ops.gpu", _jax(setting, shape))
    if importlib.util.find_spec("flashinfer") is None:
        yield {"kernel": "flashinfer", "note": "not installed"}
        return
    for shape in DECODE:
        if setting.seconds_left <= 0:
            return
        yield _row(shape, "flashinfer", _flashinfer(shape))


def _row(shape: Shape, kernel: str, seconds: float) -> Row:
    return {"shape": shape.name, "kernel": kernel, "µs": 1e6 * seconds, "GB/s": shape.kv_bytes / seconds / 1e9}


def _jax(setting: Setting, shape: Shape) -> float:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    per_sequence = -(-shape.context // shape.page_size)
    num_pages = shape.sequences * per_sequence
    pages = jnp.ones((shape.kv_heads, num_pages, shape.page_size, shape.head_dim), jnp.bfloat16)
    tables = jax.random.permutation(jax.random.key(0), num_pages).reshape(shape.sequences, per_sequence)
    q = jnp.ones((shape.sequences, shape.heads, shape.head_dim), jnp.bfloat16)
    lengths = jnp.full((shape.sequences,), shape.context, jnp.int32)
    splits = min(16, per_sequence)
    block = max(1, min(8, per_sequence // splits))

    def call():
        return paged_attention(
            *(q, pages, pages, tables.astype(jnp.int32), lengths),
            pages_per_compute_block=block,
            k_splits=splits,
            interpret=setting.interpret,
        )

    return seconds_per_call(call, rounds=1 if setting.small else 5)


def _flashinfer(shape: Shape) -> float:
    import time

    import flashinfer  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    per_sequence = -(-shape.context // shape.page_size)
    num_pages = shape.sequences * per_sequence
    kwargs = dict(dtype=torch.bfloat16, device="cuda")
    pages = torch.ones((num_pages, 2, shape.page_size, shape.kv_heads, shape.head_dim), **kwargs)
    q = torch.ones((shape.sequences, shape.heads, shape.head_dim), **kwargs)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    starts = torch.arange(shape.sequences + 1, dtype=torch.int32, device="cuda") * per_sequence
    last = torch.full((shape.sequences,), shape.context - (per_sequence - 1) * shape.page_size, dtype=torch.int32)
    wrapper.plan(
        starts,
        torch.randperm(num_pages, device="cuda").to(torch.int32),
        last.cuda(),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.page_size,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    for _ in range(3):
        wrapper.run(q, pages)
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(50):
            wrapper.run(q, pages)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 50)
    return best
