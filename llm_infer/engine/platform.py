"""What differs between platforms in a step program: data, chosen from compiled programs' memory analyses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from llm_infer.models.decoder import LayerLoop
from llm_infer.models.load import LoadedModel

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


def compiler_options(platform: str, params: Mapping[str, Any], numerics: str = "auto") -> dict[str, bool]:
    """Chooses XLA's options for the step of a model with these parameters.

    On a GPU, XLA tries its own Triton products against cuBLAS, one after the other, for every shape of every program: most of
    the time of a start. With Llama 3.1 8B on an H100 cuBLAS alone is as fast with 16 sequences, takes 22 % less time with
    256, and 10 % more with one (docs/performance.md). Quantised weights need Triton: there the product itself widens them.
    Before jax 0.11 cuBLAS would be given copies of a layer's weights.

    With the numerics "invariant" XLA rounds to bfloat16 wherever the program says so, not only where arrays reach memory: what
    is computed together may differ between programs.
    """
    if platform != "gpu":
        return {}
    options = {"xla_allow_excess_precision": False} if numerics == "invariant" else {}
    quantised = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(dict(params)))
    if not quantised and jax.__version_info__ >= CUBLAS_ALONE_SINCE:
        options["xla_gpu_enable_triton_gemm"] = False
    return options


def why_not_invariant(model: LoadedModel, platform: str) -> str | None:
    """Says why a step of this model cannot give a token the same bits in any company; None where it does."""
    if model.mesh is not None and model.mesh.size > 1:
        return "the model is cut over several devices, whose sums have no fixed order yet: take one device"
    if platform == "gpu":
        if any(x.dtype.itemsize == 1 for x in jax.tree.leaves(dict(model.params))):
            return (
                "products with quantised weights on GPUs have no fixed order yet: take weights of float32 or bfloat16"
            )
        return None
    if platform != "cpu":
        return f"XLA chooses the order of additions on {platform.upper()}s by the number of rows: take a CPU or a GPU"
    if model.smallest_batch > 1:
        return (
            "XLA multiplies with some matrices, in an order that depends on the number of rows: take dtype='float32', "
            "the native kernels (llvmlite) and a model whose rows are multiples of 32 long"
        )
    if model.config.moe is not None and jax.__version_info__ >= (0, 11):
        return f"what jax {jax.__version__} computes between experts' products differs by a last bit: take jax 0.10"
    return None
