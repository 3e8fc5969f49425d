"""Named cases of grouped matmul, shared by tests and benchmarks of every implementation (numpy only).

Rows that belong to nobody are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupedCase:
    """M rows of width K in groups of these sizes, N output features per expert."""

    rows: int
    width: int
    features: int
    group_sizes: tuple[int, ...]
    dtype: str = "float32"


CASES: dict[str, GroupedCase] = {
    "even": GroupedCase(32, 64, 48, (8, 8, 8, 8)),
    "uneven_and_empty": GroupedCase(40, 96, 32, (0, 17, 1, 0, 22, 0)),
    "padding_rows": GroupedCase(64, 32, 64, (5, 0, 9)),
    "one_expert_has_all": GroupedCase(33, 64, 16, (0, 33, 0)),
    "one_row": GroupedCase(1, 128, 128, (0, 0, 0, 1)),
    "nobody": GroupedCase(16, 32, 16, (0, 0)),
    "bfloat16": GroupedCase(48, 128, 64, (7, 0, 30, 11), dtype="bfloat16"),
    "many_experts": GroupedCase(64, 64, 32, tuple(int(i % 3 == 0) * 2 for i in range(64))),
}
LAYERS, LAYER = 2, 1

# Qwen3-30B-A3B: 128 experts, 8 of them per token, width 2048, inner size 768; decode of 64 tokens and prefill of 2048.
BENCHMARKS: dict[str, GroupedCase] = {
    "decode 64 tokens": GroupedCase(512, 2048, 768, (4,) * 128, dtype="bfloat16"),
    "prefill 2048 tokens": GroupedCase(16384, 2048, 768, (128,) * 128, dtype="bfloat16"),
}


def build(case: GroupedCase, seed: int = 0, layers: int = LAYERS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes x [M, K], weights [L, X*N, K] and group sizes [X]."""
    import ml_dtypes  # a dependency of jax; gives numpy bfloat16

    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.rows, case.width)).astype(dtype)
    x[sum(case.group_sizes) :] = np.nan
    matrices = rng.standard_normal((layers, len(case.group_sizes) * case.features, case.width)) / case.width**0.5
    return x, matrices.astype(dtype), np.array(case.group_sizes, np.int32)
