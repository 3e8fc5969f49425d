"""Block formats of GGUF tensors: their sizes, and their values as float32, bit for bit those of llama.cpp's `gguf`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llm_infer.base.errors import ModelError


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A format: `type_id` is ggml's number of the type; a block holds `block_size` values in `block_bytes` bytes."""

    type_id: int
    name: str
    block_size: int
    block_bytes: int


# The types that are read here directly. The others, and their sizes, come from the `gguf` package, whose import
# (0.15 s) the usual files do not need.
_OWN = {
    format.type_id: format
    for format in (
        BlockFormat(0, "F32", 1, 4),
        BlockFormat(1, "F16", 1, 2),
        BlockFormat(2, "Q4_0", 32, 18),
        BlockFormat(3, "Q4_1", 32, 20),
        BlockFormat(8, "Q8_0", 32, 34),
        BlockFormat(30, "BF16", 1, 2),
    )
}

# float32 values read at a time (1 MB): temporaries then stay in cache, so reading is 20 % faster than with 4 MB.
CHUNK_VALUES = 1 << 18


def block_format(type_id: int) -> BlockFormat | None:
    """Returns the format with ggml's type number, or None when there is no such type."""
    if type_id in _OWN:
        return _OWN[type_id]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for type_, (block_size, block_bytes) in GGML_QUANT_SIZES.items():
        if type_ == type_id:
            return BlockFormat(type_id, GGMLQuantizationType(type_id).name, block_size, block_bytes)
    return None


def stored_dtype(format: BlockFormat) -> np.dtype | None:
    """Returns the numpy type of values that are stored as they are, or None for block-quantised ones."""
    if format.name == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32}
    plain["I64"] = np.int64
    return np.dtype(plain[format.name]) if format.name in plain else None


def _scaled(blocks: np.ndarray, header_bytes: int) -> np.ndarray:
    """Returns the float16 numbers at the start of each block, as float32 [blocks, header_bytes / 2]."""
    return np.ascontiguousarray(blocks[:, :header_bytes]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray, bias: int, out: np.ndarray) -> None:
    """Unpacks 16 bytes per block into 32 values: low halves are values 0–15, high halves 16–31."""
    codes = np.empty((packed.shape[0], 2, 16), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=codes[:, 0])
    np.right_shift(packed, np.uint8(4), out=codes[:, 1])
    flat = codes.reshape(-1, 32)
    out[...] = flat.view(np.int8) - np.int8(bias) if bias else flat


def _read_q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 2:], 8, out)
    np.multiply(out, _scaled(blocks, 2), out=out)


def _read_q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    scale_and_min = _scaled(blocks, 4)
    _nibbles(blocks[:, 4:], 0, out)
    # This rounds twice, as the reference does: a fused multiply-add would differ in the last bit.
    np.multiply(out, scale_and_min[:, :1], out=out)
    np.add(out, scale_and_min[:, 1:], out=out)


def _read_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    np.multiply(out, _scaled(blocks, 2), out=out)


_READERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
    "Q8_0": _read_q8_0,
}


def dequantize_into(format: BlockFormat, rows: np.ndarray, out: np.ndarray) -> None:
    """Reads block-quantised rows.

    Args:
        format: a block-quantised format (`stored_dtype` is None).
        rows: uint8 [rows, bytes per row], contiguous.
        out: float32 [rows, values per row], contiguous.

    Raises:
        ModelError: the format cannot be read.
    """
    reader = _READERS.get(format.name)
    # A damaged file may hold infinite scales; what to do about non-finite weights is not this function's business.
    with np.errstate(all="ignore"):
        if reader is not None:
            reader(rows.reshape(-1, format.block_bytes), out.reshape(-1, format.block_size))
            return
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            out[...] = dequantize(rows, GGMLQuantizationType(format.type_id))
        except NotImplementedError:
            raise ModelError(
                f"tensors of GGUF type {format.name} cannot be read: choose a file in one of the types F32, F16, BF16, "
                "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K … Q6_K, IQ4_NL, IQ4_XS or MXFP4"
            ) from None
