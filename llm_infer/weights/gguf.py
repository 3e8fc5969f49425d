"""GGUF files, mapped into memory: metadata, raw blocks for native kernels, and values as floats."""

from __future__ import annotations

import copy
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.weights.gguf_blocks import CHUNK_VALUES, BlockFormat, dequantize_into, stored_dtype
from llm_infer.weights.gguf_header import Header, HeaderError, TensorInfo, parse_header
from llm_infer.weights.gguf_parts import check_part, other_parts


class GGUFTensor:
    """One tensor of a mapped file.

    Attributes:
        name: name in the file, e.g. "blk.3.attn_q.weight".
        shape: row-major, as in numpy and Hugging Face: a matrix is [out, in].
        format: how the values are stored.
        blocks: uint8 [rows, bytes per row], a read-only view of the file; rows are all but the last axis flattened.
    """

    def __init__(self, info: TensorInfo, buffer: mmap.mmap) -> None:
        self.name, self.shape, self.format = info.name, info.shape, info.format
        row_bytes = info.shape[-1] // info.format.block_size * info.format.block_bytes
        self.blocks = np.frombuffer(buffer, np.uint8, info.nbytes, info.offset).reshape(-1, row_bytes)

    @property
    def type(self) -> str:
        """Name of the storage type, e.g. "Q4_1"."""
        return self.format.name

    @property
    def dtype(self) -> np.dtype:
        """Type of the values as read: the stored type, or float32 for block-quantised tensors."""
        return stored_dtype(self.format) or np.dtype(np.float32)

    def part(self, index: int) -> GGUFTensor:
        """Returns element `index` of the first axis as a tensor of its own, e.g. one expert's matrix of a stack."""
        part, rows = copy.copy(self), self.blocks.shape[0] // self.shape[0]
        part.name, part.shape = f"{self.name}[{index}]", self.shape[1:]
        part.blocks = self.blocks[index * rows : (index + 1) * rows]
        return part

    def read_into(self, out: np.ndarray, row_order: np.ndarray | None = None) -> None:
        """Reads the values into `out` (of the tensor's shape), and converts them to its type.

        Args:
            out: any float type, any strides.
            row_order: row `row_order[i]` of the file becomes out[i]; for tensors of at most two axes.

        Raises:
            ModelError: the storage type cannot be read.
        """
        if out.shape != self.shape:
            raise ValueError(f"{self.name}: out has shape {out.shape}, expected {self.shape}")
        if out.ndim == 1:
            rows = self.blocks if row_order is None else self._single_values()
            _read_rows(self.format, rows, out[None] if row_order is None else out[:, None], row_order)
        elif out.ndim == 2:
            _read_rows(self.format, self.blocks, out, row_order)
        else:
            # A reshape of a strided `out` would copy, so its matrices are read one by one.
            height = self.shape[-2]
            for number, index in enumerate(np.ndindex(*self.shape[:-2])):
                _read_rows(self.format, self.blocks[number * height : (number + 1) * height], out[index], None)

    def _single_values(self) -> np.ndarray:
        """Returns blocks of a vector as rows of one value, so that its elements can be reordered like rows."""
        if self.format.block_size != 1:
            raise ModelError(f"tensor {self.name!r}: elements of a vector of type {self.type} cannot be reordered")
        return self.blocks.reshape(-1, self.format.block_bytes)


def _read_rows(format: BlockFormat, blocks: np.ndarray, out: np.ndarray, row_order: np.ndarray | None) -> None:
    """Reads rows [R, bytes] into out [R, values], in chunks, so that temporaries stay near 1 MB."""
    rows, width = out.shape
    stored = stored_dtype(format)
    if stored is not None:
        values = blocks.view(stored)
        # numpy converts through a small buffer of its own; only reordered rows need a temporary.
        if row_order is None:
            np.copyto(out, values, casting="unsafe")
            return
    step = max(1, CHUNK_VALUES // width)
    direct = out.dtype == np.float32 and out.flags.c_contiguous
    scratch = None if direct or stored is not None else np.empty((min(step, rows), width), np.float32)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        chunk = blocks[start:stop] if row_order is None else blocks[row_order[start:stop]]
        if stored is not None:
            np.copyto(out[start:stop], chunk.view(stored), casting="unsafe")
        elif scratch is None:
            dequantize_into(format, chunk, out[start:stop])
        else:
            values = scratch[: stop - start]
            dequantize_into(format, chunk, values)
            np.copyto(out[start:stop], values, casting="unsafe")


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: the file; of a model in several parts the first.
        version: of the format, 2 or 3.
        metadata: key → str, int, float, bool, list of str, or numpy array of numbers.
        tensors: name → tensor, in the file's order.

    Raises:
        ModelError: a file cannot be read or is damaged, or a part of the model is missing or of another model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header, buffer = _map(self.path)
        self.version, self.metadata = header.version, header.metadata
        self.tensors = {name: GGUFTensor(info, buffer) for name, info in header.tensors.items()}
        for number, part in enumerate(other_parts(self.path, self.metadata), start=1):
            header, buffer = _map(part)
            check_part(part, number, self.metadata, header.metadata)
            if twice := self.tensors.keys() & header.tensors.keys():
                raise ModelError(f"{part}: tensor {min(twice)!r} is in another part of the model, too")
            self.tensors |= {name: GGUFTensor(info, buffer) for name, info in header.tensors.items()}
        whole = self.metadata.get("split.tensors.count")
        if whole is not None and len(self.tensors) != whole:
            raise ModelError(
                f"{self.path}: all parts have {len(self.tensors)} tensors together, expected {whole!r:.80}"
            )

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Returns a metadata value of the given type.

        Raises:
            ModelError: the key is missing or has another type.
        """
        if key not in self.metadata:
            raise ModelError(f"{self.path}: metadata key {key!r} is missing")
        value = self.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ModelError(f"{self.path}: metadata {key}={value!r:.80}, expected {expected}")
        return value

    def close(self) -> None:
        """Forgets the tensors. The mapping itself goes away with the last view of a tensor's blocks."""
        self.tensors = {}


def _map(path: Path) -> tuple[Header, mmap.mmap]:
    """Maps a file into memory, and returns its header, checked, and all of it."""
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # mmap of nothing
        raise ModelError(f"{path}: the file is empty, expected a GGUF file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}), expected a GGUF file") from None
    try:
        return parse_header(buffer), buffer
    except HeaderError as error:
        raise ModelError(f"{path}: {error}") from None
