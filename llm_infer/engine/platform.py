"""What differs between platforms in a step program: data, chosen from compiled programs' memory analyses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from llm_infer.models.decoder import LayerLoop

CUBLAS_ALONE_SINCE = (0, 11)
"""The first jax whose XLA hands cuBLAS a layer's weights where they are in their stack."""


def layer_loop(platform: str) -> LayerLoop:
    """Chooses the form of the loop over layers that copies neither weights nor pages.

    A loop keeps the program small whatever the depth. On a GPU it keeps a step out of one CUDA graph and can make XLA copy a
    layer's weights. On a TPU four layers an iteration let XLA fetch the weights of the next layer under this one's
    work: 2 to 13 % fewer cycles of a decode step by its estimate than one layer, and what no loop at all would save.
    """
    loops: dict[str, LayerLoop] = {"gpu": "unroll", "tpu": 4}
    return loops.get(platform, 1)


def query_rows(platform: str, group: int) -> int:
    """Chooses the most query rows of one work item of a prefill, for `group` query heads per KV head.

    A GPU's thread block holds all heads of a group at once: 128 queries are what Hopper's matrix units want. A TPU unpacks
    a block of K and V once per item, so items are as long as the state of all their heads leaves room in VMEM.
    """
    if platform == "tpu":
        return max(16, min(128, 512 // group))
    return max(8, min(128, 128 // group)) if platform == "gpu" else 32


def compiler_options(platform: str, params: Mapping[str, Any]) -> dict[str, bool]:
    """Chooses XLA's options for the step of a model with these parameters.

    On a GPU, XLA tries its own Triton products against cuBLAS, one after the other, for every shape of every program: most of
    the time of a start. With Llama 3.1 8B on an H100 cuBLAS alone is as fast with 16 sequences, takes 22 % less time with
    256, and 10 % more with one (docs/performance.md). Quantised weights need Triton: there the product itself widens them.
    Before jax 0.11 cuBLAS would be given copies of a layer's weights.
    """
    quantised = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(dict(params)))
    if platform != "gpu" or quantised or jax.__version_info__ < CUBLAS_ALONE_SINCE:
        return {}
    return {"xla_gpu_enable_triton_gemm": False}
