"""Safetensors files, single or sharded with an index, mapped into memory.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llm_infer.base.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # byte in the file
    nbytes: int


class _DuplicateName(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _DuplicateName("a name occurs twice")
    return result


class SafetensorsFile:
    """One mapped file: name → read-only array view of it.

    Raises:
        ModelError: the file cannot be read, is cut short or is inconsistent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # mmap refuses an empty file
            raise self._bad("the file is empty") from None
        except OSError as error:
            raise self._bad(f"it cannot be read ({error.strerror})") from None
        self.entries = self._parse()

    def _bad(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: not a usable safetensors file: {what}")

    def _parse(self) -> dict[str, _Entry]:
        size = len(self._buffer)
        length = int.from_bytes(self._buffer[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise self._bad(
                f"its header of {length} bytes does not fit a file of {size}: cut short or damaged, fetch it again"
            )
        try:
            header = json.loads(self._buffer[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:  # from JSON, UTF-8 or duplicates
            raise self._bad(f"its header is not valid JSON ({str(error)[:100]})") from None
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != end:
                raise self._bad(f"the data of tensor {name!r:.100} starts at byte {entry.start}, expected {end}")
            end += entry.nbytes
        if end != size:
            raise self._bad(f"it has {size} bytes, its header describes {end}: cut short or damaged, fetch it again")
        return entries

    def _entry(self, name: str, value: Any, data_start: int) -> _Entry:
        try:
            dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise self._bad(f"the entry of tensor {name!r:.100} lacks dtype, shape or data_offsets") from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._bad(f"tensor {name!r:.100} has type {str(dtype)[:40]!r}, supported are {', '.join(DTYPES)}")
        numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or len(shape) > 8:
            raise self._bad(f"tensor {name!r:.100} has shape {str(shape)[:80]} and bytes {str([start, stop])[:80]}")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if stop - start != nbytes or data_start + stop > len(self._buffer):
            raise self._bad(
                f"tensor {name!r:.100} needs {nbytes} bytes at {data_start + start} up to {data_start + stop} of a file of "
                f"{len(self._buffer)}: cut short or damaged, fetch it again"
            )
        return _Entry(tuple(shape), DTYPES[dtype], data_start + start, nbytes)

    def array(self, name: str) -> np.ndarray:
        """Returns a read-only view of the file; it may be unaligned."""
        entry = self.entries[name]
        return np.frombuffer(self._buffer, entry.dtype, math.prod(entry.shape), entry.start).reshape(entry.shape)


class SafetensorsSource:
    """The tensors of one or several safetensors files (a `TensorSource`).

    Args:
        files: the files; no name may be in two of them.
        directory: for messages.
        weight_map: tensor name → file name of a sharded model's index; must agree with the files.

    Raises:
        ModelError: a file is not usable, see `SafetensorsFile`, or the index and the files disagree.
    """

    def __init__(
        self, files: Sequence[str | Path], *, directory: Path | None = None, weight_map: dict[str, str] | None = None
    ) -> None:
        self._description = str(directory) if directory is not None else ", ".join(map(str, files))
        self._files: dict[str, SafetensorsFile] = {}
        opened = [SafetensorsFile(path) for path in files]
        for file in opened:
            for name in file.entries:
                if name in self._files:
                    raise ModelError(f"tensor {name!r:.100} is both in {self._files[name].path} and in {file.path}")
                self._files[name] = file
        for name, filename in (weight_map or {}).items():
            if name not in self._files or self._files[name].path.name != filename:
                raise ModelError(
                    f"{self.description}: {INDEX_NAME} places tensor {name!r:.100} in {filename}, but it is not there"
                )

    @classmethod
    def from_directory(cls, directory: str | Path) -> SafetensorsSource:
        """Opens the weights of a Hugging Face directory.

        They are model.safetensors, else the files of the index, else the only safetensors file that is neither an adapter
        nor a second copy of the weights in another format; this order is that of transformers.
        """
        directory = Path(directory)
        whole = directory / "model.safetensors"
        if whole.is_file():
            return cls([whole], directory=directory)
        if (directory / INDEX_NAME).is_file():
            weight_map = _read_index(directory / INDEX_NAME)
            files = [directory / name for name in sorted(set(weight_map.values()))]
            return cls(files, directory=directory, weight_map=weight_map)
        found = sorted(directory.glob("*.safetensors"))
        files = [file for file in found if not file.name.startswith(("adapter_", "consolidated"))] or found
        if not files:
            raise ModelError(f"{directory}: no *.safetensors files")
        if len(files) > 1:
            raise ModelError(
                f"{directory}: {len(files)} safetensors files ({', '.join(f.name for f in files[:4])} …) and no "
                f"{INDEX_NAME} that says which belong together"
            )
        if files[0].name.startswith("adapter_"):
            raise ModelError(
                f"{directory} has only an adapter ({files[0].name}): give the directory of the model that it belongs to"
            )
        return cls(files, directory=directory)

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._files.keys()

    @property
    def description(self) -> str:
        """The directory, or the files."""
        return self._description

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._files[name].entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of a tensor as stored."""
        return self._files[name].entries[name].dtype

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads all values into `out`, which has the tensor's shape, and converts them to its type."""
        values = self._files[name].array(name)
        if out.shape != values.shape:
            raise ValueError(f"{name}: out has shape {out.shape}, expected {values.shape}")
        # numpy converts through a small buffer of its own, so no temporary of the tensor's size is made.
        np.copyto(out, values, casting="unsafe")

    def array(self, name: str) -> np.ndarray:
        """Returns a read-only view of a tensor."""
        return self._files[name].array(name)

    def same_values(self, name: str, other: str) -> bool:
        """Checks whether two tensors have the same shape and values, in parts of a few MB."""
        one, two = self._files[name].array(name), self._files[other].array(other)
        if one.shape != two.shape:
            return False
        one, two = one.reshape(-1), two.reshape(-1)
        parts = (slice(start, start + (1 << 20)) for start in range(0, one.size, 1 << 20))
        return all(np.array_equal(one[part].astype(np.float32), two[part].astype(np.float32)) for part in parts)

    def stored_kind(self, name: str) -> None:
        """Returns None: safetensors files hold plain values only."""
        return None

    def stored(self, name: str) -> None:
        """Returns None, as `stored_kind` does."""
        return None

    def close(self) -> None:
        """Lets go of the files. Mapped memory goes away with the last view of it."""
        self._files = {}


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({str(error)[:100]})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: expected an object 'weight_map' from tensor names to file names")
    for filename in weight_map.values():
        # Only plain names are allowed: an index must not make us read files elsewhere.
        if not isinstance(filename, str) or Path(filename).name != filename or not filename.endswith(".safetensors"):
            raise ModelError(f"{path}: weight_map names {str(filename)[:80]!r}, expected a safetensors file beside it")
        if not (path.parent / filename).is_file():
            raise ModelError(f"{path.parent}: {filename} is missing, which {path.name} names; fetch the model again")
    return weight_map
