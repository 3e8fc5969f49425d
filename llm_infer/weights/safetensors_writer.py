"""Writes safetensors files, one tensor at a time, in a directory that appears complete or not at all.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress, Task
from llm_infer.weights.checkpoint_writer import checked_destination
from llm_infer.weights.on_disk import sync, sync_tree, write_files
from llm_infer.weights.safetensors_files import DTYPES, INDEX_NAME

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in a file, as transformers writes them; a larger tensor has a file of its own."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The number of bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(
    destination: str | Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    files: Mapping[str, bytes],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes tensors and other files to `destination.tmp-…`, which is then renamed; an error leaves nothing.

    Args:
        destination: a directory that does not exist or is empty.
        specs: all tensors, in the order in which they come.
        tensors: names and values; no more than one is held.
        files: relative path → content.
        shard_bytes: most bytes of tensors in one file.
        progress: reports bytes written; None is silent.

    Returns:
        The absolute path of the directory.

    Raises:
        ModelError: the destination is in use or cannot be written, or a file's name leads out of it.
    """
    path = checked_destination(destination)
    for name in files:
        if not name or "\0" in name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ModelError(f"{name[:60]!r} is no name of a file below {path}")
    for spec in specs:
        if spec.dtype not in _NAMES:
            raise ModelError(f"{spec.name} has the type {spec.dtype}, supported are {', '.join(DTYPES)}")
    total = sum(spec.nbytes for spec in specs)
    shards = _shards(specs, shard_bytes)
    unfinished = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < total:
            raise ModelError(f"{path.parent} has {free / 1e6:.0f} MB left, the model needs {total / 1e6:.0f} MB")
        with (progress or Progress.silent()).task("Writing model", total=total, unit="bytes") as task:
            write_files(unfinished, files)
            pairs = iter(tensors)
            for name, shard in shards.items():
                _write_shard(unfinished / name, shard, pairs, task)
            if len(shards) > 1:
                weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                (unfinished / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            sync_tree(unfinished)
            os.replace(unfinished, path)  # fails if something has appeared there meanwhile
            sync(path.parent)
    except OSError as error:
        raise ModelError(f"cannot write the model {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _shards(specs: Sequence[TensorSpec], shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Shares the tensors out over files, in their order, under the names that transformers gives them."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def _write_shard(
    file: Path, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, np.ndarray]], task: Task
) -> None:
    """Writes one file of the next tensors."""
    starts, end = {}, 0
    # Wide types first: then each tensor's address is a multiple of its type's size.
    for spec in sorted(specs, key=lambda each: each.dtype.itemsize, reverse=True):
        starts[spec.name] = end
        end += spec.nbytes
    header = {
        "__metadata__": {"format": "pt"},  # without which transformers does not read it
        **{
            spec.name: {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [starts[spec.name], starts[spec.name] + spec.nbytes],
            }
            for spec in specs
        },
    }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little"))
        out.write(encoded)
        begin = out.tell()
        for spec in specs:
            name, values = next(tensors, ("", np.empty(0)))
            if (name, values.shape, values.dtype) != (spec.name, spec.shape, spec.dtype):
                raise ValueError(f"{name} {values.shape} {values.dtype} came, expected {spec}")
            out.seek(begin + starts[name])
            np.ascontiguousarray(values).tofile(out)
            task.advance(spec.nbytes)
