"""Named cases of ragged paged attention, shared by tests and benchmarks of every implementation (numpy only).

Whatever a kernel must not read is NaN: unused pages, the null page, slots past a sequence's last token, padding rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pallas_kernels.paged_attention.page_width import page_width
from pallas_kernels.paged_attention.plan import AttentionPlan, PlanShape, fill_plan, plan_fields

NUM_LAYERS = 2
LAYER = 1  # the layer on which the case runs; layer 0 must stay untouched
POOL_MARGIN = 4  # pages that belong to nobody


@dataclass(frozen=True)
class Sizes:
    """Sizes that decide all array shapes: cases with equal sizes and options can share one compiled program."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    tokens: int
    sequences: int
    pages_per_seq: int
    q_block: int
    page_dtype: str = "float32"
    dtype: str = "float32"

    @property
    def plan(self) -> PlanShape:
        """The plan's static sizes."""
        return PlanShape(self.tokens, self.sequences, self.pages_per_seq, self.q_block)

    @property
    def num_pages(self) -> int:
        """P, enough for S full sequences."""
        return self.sequences * self.pages_per_seq + 1 + POOL_MARGIN


@dataclass(frozen=True)
class AttentionCase:
    """One case: sizes, (rows in this step, tokens in all) of each sequence, and the op's options.

    Attributes:
        sizes: array shapes.
        batch: (q_len, kv_len) of each sequence.
        options: static keyword arguments of the op (window, softcap).
        sinks: whether the heads have sinks.
        kv_scales: (k_scale, v_scale) or None.
        plan_window: window known to the plan (page runs are cut); None plans whole runs.
        shared_pages: leading pages that sequence 1 shares with sequence 0 (prefix cache).
    """

    sizes: Sizes
    batch: tuple[tuple[int, int], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    sinks: bool = False
    kv_scales: tuple[float, float] | None = None
    plan_window: int | None = None
    shared_pages: int = 0


@dataclass(frozen=True)
class Inputs:
    """Arguments for one call of `paged_attention`, as numpy arrays (page and compute dtypes from ml_dtypes).

    Attributes:
        q, k_new, v_new, pages, plan: the positional arguments, `pages` in the plain layout.
        options: the static keyword arguments (window, softcap).
        arrays: the array keyword arguments (layer, sinks, k_scale, v_scale), only those that the case has.
        scale: factor of the scores.
        history: for each sequence, K and V [2, tokens, Hkv, D] of all its tokens, this step's included, as numbers after
            the division by the scales and the cast to the page dtype, in float64: for an independent check.
        stored: the same in the pool's dtype, with what else a page holds of a token.
    """

    q: np.ndarray
    k_new: np.ndarray
    v_new: np.ndarray
    pages: np.ndarray
    plan: AttentionPlan
    options: dict[str, Any]
    arrays: dict[str, np.ndarray]
    scale: float
    history: list[np.ndarray]
    stored: list[np.ndarray]


# Sizes are equal on purpose: a test compiles one program per implementation for all of them.
GQA3 = Sizes(
    num_heads=6, num_kv_heads=2, head_dim=64, page_size=16, tokens=32, sequences=8, pages_per_seq=20, q_block=8
)
TINY_BUCKET = Sizes(6, 2, 64, 16, tokens=2, sequences=2, pages_per_seq=20, q_block=8)
MHA = Sizes(4, 4, 80, 32, tokens=24, sequences=4, pages_per_seq=5, q_block=16)  # q_block does not divide T
GQA4 = Sizes(8, 2, 128, 64, tokens=16, sequences=4, pages_per_seq=3, q_block=4, page_dtype="bfloat16")
HOPPER = replace(GQA4, dtype="bfloat16")  # as the Mosaic GPU kernel needs them
GQA8 = Sizes(8, 1, 64, 16, tokens=16, sequences=4, pages_per_seq=10, q_block=16)
FLOAT8 = Sizes(6, 2, 64, 32, 16, 4, 5, 8, page_dtype="float8_e4m3fn", dtype="bfloat16")
INT8 = Sizes(6, 2, 64, 32, 16, 4, 5, 8, page_dtype="int8")
OWN_SCALES = replace(INT8, page_dtype="uint8")  # int8 pages on the CPU
OWN_SCALES_128 = replace(GQA4, page_dtype="uint8")
BF16_BITS = Sizes(6, 2, 64, 32, 16, 4, 5, 8, page_dtype="uint16", dtype="bfloat16")  # bfloat16 pages on the CPU

MIXED = ((1, 300), (1, 16), (1, 17), (1, 1), (3, 40), (9, 9), (8, 150), (7, 129))  # 31 rows: one is padding

CASES: dict[str, AttentionCase] = {
    "mixed": AttentionCase(GQA3, MIXED),
    "decode_full_batch": AttentionCase(
        GQA3, ((1, 1), (1, 15), (1, 16), (1, 128), (1, 129), (1, 320), (1, 2), (1, 257))
    ),
    "prefill_full_bucket": AttentionCase(GQA3, ((32, 32),)),
    "prefill_last_chunk": AttentionCase(GQA3, ((13, 313),)),
    "one_row_tail": AttentionCase(GQA3, ((17, 50), (9, 9))),  # items of 8, 8, 1 and 8, 1 rows
    "empty_sequences": AttentionCase(GQA3, ((0, 0), (1, 33), (0, 20), (5, 21), (0, 0))),
    "no_sequences": AttentionCase(GQA3, ()),
    "shared_prefix": AttentionCase(GQA3, ((1, 40), (4, 60)), shared_pages=2),
    "tiny_bucket_decode": AttentionCase(TINY_BUCKET, ((1, 300), (1, 31))),
    "tiny_bucket_padded": AttentionCase(TINY_BUCKET, ((1, 17),)),
    "tiny_bucket_two_rows": AttentionCase(TINY_BUCKET, ((2, 18),)),
    "window": AttentionCase(GQA3, MIXED, {"window": 20}),
    "window_planned": AttentionCase(GQA3, MIXED, {"window": 20}, plan_window=20),
    "window_of_one": AttentionCase(GQA3, MIXED, {"window": 1}, plan_window=1),
    "softcap_sinks": AttentionCase(GQA3, MIXED, {"softcap": 5.0, "window": 999}, sinks=True, kv_scales=(1.0, 1.0)),
    "everything": AttentionCase(GQA3, MIXED, {"softcap": 5.0, "window": 37}, sinks=True, kv_scales=(0.5, 2.0)),
    "mha_head_80": AttentionCase(MHA, ((1, 100), (17, 130), (5, 5), (1, 32))),
    "gqa4_head_128_bf16_pages": AttentionCase(GQA4, ((1, 150), (6, 70), (8, 8), (1, 64))),
    "bf16_decode": AttentionCase(HOPPER, ((1, 150), (1, 64), (1, 192), (1, 1))),
    "bf16_mixed_everything": AttentionCase(
        HOPPER, ((1, 150), (6, 70), (1, 65), (1, 130)), {"softcap": 5.0, "window": 100}, sinks=True
    ),
    "gqa8_one_kv_head_window": AttentionCase(GQA8, ((1, 150), (9, 70), (1, 17)), {"window": 50}),
    "bf16_bits_pages": AttentionCase(BF16_BITS, ((1, 150), (9, 70), (1, 17))),
    "float8_pages_scales": AttentionCase(FLOAT8, ((1, 150), (9, 70), (1, 17)), kv_scales=(0.25, 0.5)),
    "int8_pages_scales": AttentionCase(INT8, ((1, 150), (9, 70), (1, 17)), kv_scales=(0.03, 0.03)),
    "own_scales": AttentionCase(OWN_SCALES, ((1, 150), (9, 70), (1, 17))),
    "own_scales_head_128_everything": AttentionCase(
        OWN_SCALES_128, ((1, 150), (6, 70), (8, 8), (1, 64)), {"softcap": 5.0, "window": 37}, sinks=True
    ),
}

# The default model's attention (SmolLM2-135M: 30 layers of 9 heads over 3), for timing; context up to 8192 tokens.
_SMOLLM2 = Sizes(9, 3, 64, 16, tokens=8, sequences=8, pages_per_seq=512, q_block=64)
BENCHMARK_LAYERS = 30
BENCHMARKS: dict[str, AttentionCase] = {
    "smollm2_decode_8": AttentionCase(  # mean length 324
        _SMOLLM2,
        tuple((1, n) for n in (100, 180, 260, 324, 324, 388, 468, 548)),
    ),
    "smollm2_decode_32": AttentionCase(
        replace(_SMOLLM2, tokens=32, sequences=32), tuple((1, 100 + 14 * i) for i in range(32))
    ),
    "smollm2_prefill_512": AttentionCase(replace(_SMOLLM2, tokens=512, sequences=32), ((512, 512),)),
    "smollm2_mixed_512": AttentionCase(
        replace(_SMOLLM2, tokens=512, sequences=32), (*((1, 100 + 14 * i) for i in range(31)), (481, 1200))
    ),
}

# Serving in bfloat16, for records and timings on accelerators: the attention of Llama-3.1-8B, which is also Qwen3-8B's, and
# of a model with heads of 64 (Llama-3.2-1B).
_HEADS_OF_128 = Sizes(32, 8, 128, 64, 64, 64, 64, 64, page_dtype="bfloat16", dtype="bfloat16")
_HEADS_OF_64 = replace(_HEADS_OF_128, head_dim=64)
_DECODE, _PREFILL = ((1, 4096),) * 64, ((2048, 2048),)
PRODUCTION: dict[str, AttentionCase] = {
    "decode, 64 × 4096 tokens, heads of 128": AttentionCase(_HEADS_OF_128, _DECODE),
    "decode, 64 × 4096 tokens, heads of 64": AttentionCase(_HEADS_OF_64, _DECODE),
    "decode, 64 × 4096 tokens, heads of 128, int8": AttentionCase(
        replace(_HEADS_OF_128, page_dtype="int8"), _DECODE, kv_scales=(0.02, 0.02)
    ),
    "decode, 64 × 4096 tokens, heads of 128, float8": AttentionCase(
        replace(_HEADS_OF_128, page_dtype="float8_e4m3fn"), _DECODE, kv_scales=(0.02, 0.02)
    ),
    "prefill, 2048 tokens, heads of 128": AttentionCase(replace(_HEADS_OF_128, tokens=2048), _PREFILL),
    "prefill, 2048 tokens, heads of 64": AttentionCase(replace(_HEADS_OF_64, tokens=2048), _PREFILL),
}


def build(
    case: AttentionCase, seed: int = 0, num_layers: int = NUM_LAYERS, layer: int = LAYER, num_pages: int | None = None
) -> Inputs:
    """Makes the inputs of a case. Each sequence's numbers depend on (seed, its place in the batch) alone.

    Args:
        case: the case to build.
        seed: seed of the random numbers.
        num_layers: L, layers of the pool.
        layer: the layer that holds the history; the others are NaN.
        num_pages: P; None is enough for S full block tables.
    """
    sizes, shape = case.sizes, case.sizes.plan
    dtype = _dtype(sizes.dtype)
    page_dtype = _dtype("bfloat16" if sizes.page_dtype == "uint16" else sizes.page_dtype)
    num_pages = sizes.num_pages if num_pages is None else num_pages
    kv_shape = (sizes.num_kv_heads, sizes.head_dim)
    rng = np.random.default_rng(seed)
    free = (rng.permutation(num_pages - 1) + 1).tolist()
    tables: list[list[int]] = []
    for index, (_, kv_len) in enumerate(case.batch):
        shared = tables[0][: case.shared_pages] if index == 1 else []
        tables.append(shared + [free.pop() for _ in range(-(-kv_len // sizes.page_size) - len(shared))])

    # int8 has no NaN: its largest number poisons well enough. A scale of bytes of 255 is NaN.
    poison = np.array({"int8": 127, "uint8": 255}.get(page_dtype.name, np.nan)).astype(page_dtype)
    width = page_width(sizes.head_dim, sizes.page_dtype)
    pages = np.full((num_layers, num_pages, 2, sizes.num_kv_heads, sizes.page_size, width), poison)
    q = np.full((sizes.tokens, sizes.num_heads, sizes.head_dim), np.nan, dtype)
    k_new, v_new = (np.full((sizes.tokens, *kv_shape), np.nan, dtype) for _ in range(2))
    scales = np.array(case.kv_scales or (1.0, 1.0), np.float32).reshape(2, 1, 1, 1)
    history: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    first_kv = np.zeros(0)
    row = 0
    for index, (q_len, kv_len) in enumerate(case.batch):
        own = np.random.default_rng((seed, index))
        q[row : row + q_len] = own.standard_normal((q_len, sizes.num_heads, sizes.head_dim)).astype(dtype)
        kv = own.standard_normal((2, kv_len, *kv_shape)).astype(dtype)
        if index == 0:
            first_kv = kv
        elif index == 1:
            both = case.shared_pages * sizes.page_size
            kv[:, :both] = first_kv[:, :both]
        k_new[row : row + q_len], v_new[row : row + q_len] = kv[:, kv_len - q_len :]
        numbers, own = kv.astype(np.float32) / scales, np.ones(1, np.float32)
        if page_dtype == np.uint8:
            own = np.abs(numbers).max(-1, keepdims=True) * np.float32(1 / 127)
            numbers = numbers * (1 / own)
        if page_dtype in (np.int8, np.uint8):
            numbers = np.clip(np.round(numbers), -127, 127).astype(np.int8)
        stored = numbers = numbers.astype(np.int8 if page_dtype == np.uint8 else page_dtype)
        if page_dtype == np.uint8:
            stored = np.concatenate([numbers.view(np.uint8), own.view(np.uint8)], axis=-1)
        for position in range(kv_len - q_len):
            page = tables[index][position // sizes.page_size]
            pages[layer, page, :, :, position % sizes.page_size] = stored[:, position]
        history.append(numbers.astype(np.float64) * own)
        slots.append(stored.view(np.uint16) if sizes.page_dtype == "uint16" else stored)
        row += q_len

    out = {name: np.full(dims, -1, np.int32) for name, dims in plan_fields(shape).items()}
    q_lens, kv_lens = [q_len for q_len, _ in case.batch], [kv_len for _, kv_len in case.batch]
    fill_plan(shape, out, q_lens, kv_lens, tables, sizes.page_size, case.plan_window)
    arrays: dict[str, np.ndarray] = {"layer": np.asarray(layer, np.int32)}
    if case.sinks:
        arrays["sinks"] = np.random.default_rng(seed).standard_normal(sizes.num_heads).astype(np.float32)
    if case.kv_scales is not None:
        arrays["k_scale"], arrays["v_scale"] = (np.asarray(scale) for scale in scales.reshape(2))
    return Inputs(
        q=q,
        k_new=k_new,
        v_new=v_new,
        pages=pages.view(np.uint16) if sizes.page_dtype == "uint16" else pages,
        plan=AttentionPlan(**out),
        options=dict(case.options),
        arrays=arrays,
        scale=sizes.head_dim**-0.5,
        history=history,
        stored=slots,
    )


def _dtype(name: str) -> np.dtype:
    import ml_dtypes  # a dependency of jax; gives numpy bfloat16 and float8

    return np.dtype(getattr(ml_dtypes, name, name))
