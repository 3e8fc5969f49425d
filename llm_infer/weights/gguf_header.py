"""The header of a GGUF file (versions 2 and 3): metadata and tensor directory, every read checked against the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_infer.weights.gguf_blocks import BlockFormat, block_format

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_NUMPY = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_KEY_BYTES = 65535  # the format's limit
_MAX_NESTING = 4  # of arrays in arrays; the format sets no limit, no known file goes beyond 1
_MIN_METADATA_BYTES = 13  # length of an empty key, type, one byte of the value
_MIN_TENSOR_BYTES = 32  # length of an empty name, one dimension, type, offset


class HeaderError(Exception):
    """A damaged header; the message says how it is damaged, without the file's name."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor directory: `shape` is row-major, `offset` counts bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata (strings, numbers, lists of strings, numpy arrays of numbers) and the tensor directory."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def parse_header(buffer: mmap.mmap) -> Header:
    """Parses and checks the header. No allocation exceeds the size of the file.

    Raises:
        HeaderError: the file is not GGUF, is cut short or is inconsistent.
    """
    cursor = _Cursor(buffer)
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise HeaderError(f"it starts with {magic!r} where b'GGUF' is expected: this is not a GGUF file")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        if version in (2 << 24, 3 << 24):
            raise HeaderError("it is big-endian: convert it with llama.cpp's gguf_convert_endian.py")
        raise HeaderError(f"GGUF version {version}, expected 2 or 3: convert the model again with a newer llama.cpp")
    tensor_count = cursor.count("<Q", _MIN_TENSOR_BYTES, "tensors")
    metadata_count = cursor.count("<Q", _MIN_METADATA_BYTES, "metadata entries")

    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string(_MAX_KEY_BYTES)
        if key in metadata:
            raise HeaderError(f"metadata key {key!r:.100} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    directory = [cursor.tensor() for _ in range(tensor_count)]
    return Header(version, metadata, _place(directory, cursor.position, metadata, len(buffer)))


def _place(directory: list[TensorInfo], end: int, metadata: dict[str, Any], size: int) -> dict[str, TensorInfo]:
    """Turns offsets that count from the data section into file offsets, and checks that every tensor lies in the file."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise HeaderError(f"general.alignment={alignment!r}, expected a power of two")
    start = -(-end // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in directory:
        if info.name in tensors:
            raise HeaderError(f"tensor {info.name!r:.100} occurs twice")
        if info.offset % alignment:
            raise HeaderError(f"tensor {info.name!r:.100} starts at {info.offset}, not a multiple of {alignment}")
        offset = start + info.offset
        if offset + info.nbytes > size:
            raise HeaderError(
                f"tensor {info.name!r:.100} needs bytes up to {offset + info.nbytes} of a file of {size}: the file is cut "
                "short or damaged, fetch it again"
            )
        tensors[info.name] = TensorInfo(info.name, info.shape, info.format, offset, info.nbytes)
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise HeaderError(f"tensors {before.name!r} and {after.name!r} overlap")
    return tensors


class _Cursor:
    """Reads forward through the mapped file and refuses to read past its end."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.position, self.end = buffer, 0, len(buffer)

    def _require(self, nbytes: int) -> int:
        """Checks that `nbytes` more bytes exist, moves past them, and returns where they start."""
        start = self.position
        if nbytes > self.end - start:
            raise HeaderError(
                f"it ends at byte {self.end} where the header needs bytes up to {start + nbytes}: the file is cut "
                "short or damaged, fetch it again"
            )
        self.position = start + nbytes
        return start

    def take(self, nbytes: int) -> bytes:
        start = self._require(nbytes)
        return self.buffer[start : self.position]

    def scalar(self, format: str) -> Any:
        return struct.unpack_from(format, self.buffer, self._require(struct.calcsize(format)))[0]

    def count(self, format: str, item_bytes: int, what: str) -> int:
        """Reads a count; refuses it at once if that many items of at least `item_bytes` cannot be in the rest of the file."""
        number = self.scalar(format)
        if number * item_bytes > self.end - self.position:
            raise HeaderError(f"it announces {number} {what}, more than a file of {self.end} bytes can hold")
        return number

    def string(self, limit: int | None = None) -> str:
        length = self.scalar("<Q")
        if limit is not None and length > limit:
            raise HeaderError(f"a name of {length} bytes, the format allows {limit}")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise HeaderError(f"the string before byte {self.position} is not UTF-8") from None

    def value(self, type_id: int, depth: int = 0) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id != _ARRAY:
            raise HeaderError(f"unknown metadata type {type_id} before byte {self.position}")
        if depth == _MAX_NESTING:
            raise HeaderError(f"arrays nested deeper than {_MAX_NESTING} before byte {self.position}")
        item_type = self.scalar("<I")
        if item_type == _STRING:
            return self.strings(self.count("<Q", 8, "strings"))
        if item_type in _NUMPY:
            dtype = np.dtype(_NUMPY[item_type])
            count = self.count("<Q", dtype.itemsize, "numbers")
            start = self._require(count * dtype.itemsize)
            # Numbers are copied: views would keep the file mapped for as long as the metadata lives.
            numbers = np.frombuffer(self.buffer, np.uint8 if item_type == _BOOL else dtype, count, start)
            return numbers != 0 if item_type == _BOOL else numbers.copy()
        if item_type != _ARRAY:
            raise HeaderError(f"unknown metadata type {item_type} before byte {self.position}")
        return [self.value(_ARRAY, depth + 1) for _ in range(self.count("<Q", 12, "arrays"))]

    def strings(self, count: int) -> list[str]:
        """Reads an array of strings. A vocabulary has 10⁵ of them, so this loop is written for speed."""
        buffer, position, end = self.buffer, self.position, self.end
        length_at = struct.Struct("<Q").unpack_from
        items: list[bytes] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(buffer, position)[0]
                if position > end:
                    break
                items.append(buffer[start:position])
        except struct.error:  # fewer than the eight bytes of the length are left
            pass
        if len(items) != count:
            raise HeaderError(
                f"it ends at byte {end} within an array of {count} strings: the file is cut short or damaged, fetch it "
                "again"
            )
        self.position = position
        try:
            return list(map(bytes.decode, items))
        except UnicodeDecodeError:
            raise HeaderError(f"a string in the array before byte {position} is not UTF-8") from None

    def tensor(self) -> TensorInfo:
        """Reads a directory entry; its offset still counts from the data section."""
        name = self.string(_MAX_KEY_BYTES)
        dimensions = self.scalar("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise HeaderError(f"tensor {name!r:.100} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        # The file lists the fastest dimension first.
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))[::-1]
        type_id, offset = self.scalar("<I"), self.scalar("<Q")
        format = block_format(type_id)
        if format is None:
            raise HeaderError(
                f"tensor {name!r:.100} has the unknown type {type_id}: a newer `gguf` package may know it"
            )
        if 0 in shape or shape[-1] % format.block_size:
            raise HeaderError(
                f"tensor {name!r:.100} has shape {list(shape)}, not a number of {format.name} blocks of {format.block_size}"
            )
        return TensorInfo(name, shape, format, offset, math.prod(shape) // format.block_size * format.block_bytes)
