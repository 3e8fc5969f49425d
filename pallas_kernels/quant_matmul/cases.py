"""Shapes and random blocks of quantised matmul, shared by tests and benchmarks of every implementation (numpy only)."""

from __future__ import annotations

import numpy as np

from pallas_kernels.quant_matmul.formats import FORMATS

# Offsets of the float16 scales in a block: everything else may be any byte.
_SCALES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "iq4_nl": (0,), "mxfp4": (),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,),
}  # fmt: skip

# (N, K): sizes of the default model, an odd N, N under a tile, one block per row, K beyond a tile.
SHAPES = ((576, 576), (48, 512), (37, 1536), (3, 256), (64, 32), (1, 2560))
ROWS = (*range(1, 17), 49)  # M

# The default model's matrices (SmolLM2-135M), for timing: name → (kind, L, N, K).
BENCHMARKS = {
    "qkv": ("q4_1", 30, 960, 576),
    "o": ("q4_1", 30, 576, 576),
    "gate_up": ("q4_1", 30, 3072, 576),
    "down": ("q4_1", 30, 576, 1536),
    "head": ("q8_0", 1, 49152, 576),
}


def shapes(kind: str) -> tuple[tuple[int, int], ...]:
    """Returns the (N, K) of SHAPES that have whole blocks of this kind."""
    return tuple((n, k) for n, k in SHAPES if k % FORMATS[kind].elements == 0)


def random_blocks(kind: str, num_layers: int, n: int, k: int, seed: int = 0, size: float = 0.02) -> np.ndarray:
    """Makes [L, N, R] of any bytes, with scales of this size (those of mxfp4 have any ordinary one); of normal numbers for dense
    kinds."""
    rng, fmt = np.random.default_rng(seed), FORMATS[kind]
    if fmt.dtype != "uint8":
        import ml_dtypes  # a dependency of jax; gives numpy bfloat16

        return rng.standard_normal((num_layers, n, k)).astype(getattr(ml_dtypes, fmt.dtype, fmt.dtype))
    blocks = rng.integers(0, 256, (num_layers, n, k // fmt.elements, fmt.bytes), dtype=np.uint8)
    for offset in _SCALES[kind]:
        scale = rng.normal(0, size, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = scale[..., None].view(np.uint8)
    if kind == "mxfp4":
        blocks[..., 0] = rng.integers(118, 127, blocks.shape[:-1])  # scales of 2^-10 to 2^-2
    return blocks.reshape(num_layers, n, fmt.row_items(k))


def random_rows(m: int, k: int, seed: int = 0) -> np.ndarray:
    """Makes [M, K] float32; row i does not depend on M."""
    return np.stack([np.random.default_rng((seed, i)).standard_normal(k) for i in range(m)]).astype(np.float32)
