"""GGUF files of a small Llama whose matrices have any types of blocks, for the tests of stored weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from pallas_kernels.quant_matmul.cases import random_blocks

HEAD = 64
KINDS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
"""Every type that native kernels multiply with, by GGUF's name."""


def random_matrix(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Makes rows of blocks whose weights have a standard deviation of columns^-0.5."""
    type_, size = GGMLQuantizationType[kind], columns**-0.5
    values = size * rng.standard_normal((rows, columns), np.float32)
    try:
        return quantize(values, type_)
    except NotImplementedError:  # `gguf` reads more types than it writes
        seed = int(rng.integers(1 << 31))
        spread = dequantize(random_blocks(kind.lower(), 1, rows, columns, seed)[0], type_).std()
        return random_blocks(kind.lower(), 1, rows, columns, seed, size=0.02 * size / spread)[0]


def write_llama(
    path: Path, kind: Callable[[str], str], *, layers: int = 1, width: int = 256, ff: int = 256, vocab: int = 48
) -> None:
    """Writes a Llama with half as many KV heads as heads; `kind` names the type of a matrix, by its name in the file."""
    rng, writer = np.random.default_rng(0), GGUFWriter(path, "llama")
    writer.add_vocab_size(vocab)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(width // HEAD)
    writer.add_head_count_kv(width // HEAD // 2)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    matrices = {"token_embd": (vocab, width)}
    norms = ["output_norm"]
    for layer in range(layers):
        shapes = {
            "attn_q": (width, width),
            "attn_k": (width // 2, width),
            "attn_v": (width // 2, width),
            "attn_output": (width, width),
            "ffn_gate": (ff, width),
            "ffn_up": (ff, width),
            "ffn_down": (width, ff),
        }
        matrices |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    for name in norms:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, width).astype(np.float32))
    for name, (rows, columns) in matrices.items():
        found = kind(name)
        writer.add_tensor(
            f"{name}.weight", random_matrix(found, rows, columns, rng), raw_dtype=GGMLQuantizationType[found]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
