"""Zarr arrays on disk: header and files checked; of uncompressed ones, values mapped into memory instead of read.

Format: Zarr version 2, https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows "bfloat16" by name once it is imported
import numpy as np

from llm_infer.base.errors import ModelError

DAMAGED = "the checkpoint is damaged or incomplete: write it again with `llm-infer convert`"
_TOUCHED = 16 << 20  # bytes between two reports of progress


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One Zarr array (version 2): the header of its folder."""

    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    compressed: bool = False

    @property
    def nbytes(self) -> int:
        """The number of bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def single_file(self) -> Path | None:
        """The file that holds all values in C order, None if there are several or it is compressed."""
        whole = self.shape and self.chunks == self.shape and not self.compressed
        return self.folder / ".".join("0" * len(self.shape)) if whole else None

    @classmethod
    def open(cls, folder: Path) -> StoredArray:
        """Reads the header and checks that all files are there and have their size.

        Zarr takes a missing file for a run of fill values, so the check cannot be left to the reader.

        Raises:
            ModelError: a file is missing or damaged.
        """
        header = read_header(folder / ".zarray")
        try:
            shape, chunks = (tuple(int(n) for n in header[key]) for key in ("shape", "chunks"))
            dtype = np.dtype(header["dtype"])
            layout, compressor = [header[key] for key in ("zarr_format", "filters", "order")], header["compressor"]
            separator = header.get("dimension_separator", ".")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / '.zarray'}: not the header of an array ({error}); {DAMAGED}") from None
        if (
            layout != [2, None, "C"]
            or not isinstance(compressor, dict | None)
            or separator != "."
            or len(shape) != len(chunks)
            or min(chunks, default=1) < 1
        ):
            raise ModelError(f"{folder / '.zarray'}: not as Orbax writes it; {DAMAGED}")
        expected = None if compressor is not None else math.prod(chunks) * dtype.itemsize
        for index in _chunk_indices(shape, chunks):
            check_size(folder / (".".join(index) or "0"), expected)
        return cls(folder, shape, chunks, dtype, compressor is not None)

    def map(self, file: Path) -> np.ndarray:
        """Returns all values; they are read from the file when they are touched. The file must not change while they are in
        use."""
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
        return np.frombuffer(mapped, self.dtype).reshape(self.shape)


def touch_pages(values: np.ndarray) -> Iterator[int]:
    """Brings every page of a mapped array into memory before it is first used; yields bytes as they arrive."""
    data = values.reshape(-1).view(np.uint8)
    for start in range(0, data.size, _TOUCHED):
        part = data[start : start + _TOUCHED]
        part[:: mmap.PAGESIZE].max()
        yield part.size


def check_chunks(folder: Path) -> None:
    """Checks that all files of an array are there, in Zarr of version 2 or 3.

    Raises:
        ModelError: one is missing, or the header is.
    """
    if not (folder / "zarr.json").is_file():
        StoredArray.open(folder)
        return
    header = read_header(folder / "zarr.json")
    try:
        shape, chunks = header["shape"], header["chunk_grid"]["configuration"]["chunk_shape"]
        separator = header["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
        indices = list(_chunk_indices(shape, chunks))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / 'zarr.json'}: not the header of an array ({error}); {DAMAGED}") from None
    for index in indices:
        check_size(folder / separator.join(("c", *index)), None)


def _chunk_indices(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """Yields the place of each chunk along every axis."""
    for index in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunks, strict=True))):
        yield tuple(map(str, index))


def check_size(file: Path, expected: int | None) -> None:
    """Raises `ModelError` unless there is a file of exactly this many bytes; None for any."""
    if not file.is_file():
        raise ModelError(f"{file} is missing; {DAMAGED}")
    found = file.stat().st_size
    if expected is not None and found != expected:
        raise ModelError(f"{file} has {found} bytes, expected {expected}; {DAMAGED}")


def read_header(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ModelError: the file is missing, cannot be read or holds no JSON object.
    """
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); {DAMAGED}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON ({error}); {DAMAGED}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(values).__name__}; {DAMAGED}")
    return values
