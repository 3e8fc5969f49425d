"""Writes a checkpoint so that it is there completely or not at all, whenever the process ends."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_infer.base.errors import ModelError
from llm_infer.base.files import typed_path
from llm_infer.base.progress import Progress
from llm_infer.weights.on_disk import sync, sync_tree, write_files
from llm_infer.weights.orbax_checkpoint import DTYPES, FORMAT_VERSION, MANIFEST, PARAMS, TOKENIZER, write_parameters

if TYPE_CHECKING:
    import jax


def checked_destination(destination: str | Path) -> Path:
    """Returns the absolute path of a directory to which a checkpoint can be written: it does not exist, or is empty.

    Raises:
        ModelError: something is there.
    """
    path = typed_path(destination).resolve()
    if path.is_dir() and any(path.iterdir()):
        raise ModelError(f"{path} exists and is not empty: give a new directory, or remove it first")
    if path.exists() and not path.is_dir():
        raise ModelError(f"{path} is a file: give a new directory for the checkpoint")
    return path


def write_checkpoint(
    destination: str | Path,
    parameters: Mapping[str, jax.Array],
    *,
    model: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint that appears at `destination` only when it is complete and on disk.

    Everything is written to `destination.tmp-…`, which is renamed; then the manifest, without which nothing loads, is
    renamed into place. An error removes all of it; a killed process leaves a directory that does not load.

    Args:
        destination: directory that does not exist or is empty.
        parameters: by dotted name, on any mesh, all of one type out of `DTYPES`, but for some that are always float32.
        model: the model's configuration as JSON values.
        tokenizer_files: relative path → content, found again in `Checkpoint.tokenizer_directory`.
        progress: reports bytes written; None is silent.

    Raises:
        ModelError: the destination is in use or cannot be written.
    """
    path = checked_destination(destination)
    dtypes = {str(array.dtype) for array in parameters.values()}
    if not dtypes or not dtypes <= DTYPES.keys():
        raise ModelError(f"parameters of type {', '.join(sorted(dtypes))}: a checkpoint has one of {', '.join(DTYPES)}")
    narrow = dtypes - {"float32"}
    manifest = {
        "format": "llm_infer checkpoint",
        "version": FORMAT_VERSION,
        "dtype": min(narrow or dtypes),
        "model": dict(model),
        "tokenizer": {name: len(content) for name, content in sorted(tokenizer_files.items())},
    }
    total = sum(array.nbytes for array in parameters.values())
    unfinished = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    mine: Path | None = unfinished
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < total:
            raise ModelError(f"{path.parent} has {free / 1e6:.0f} MB left, the checkpoint needs {total / 1e6:.0f} MB")
        with (progress or Progress.silent()).task("Writing checkpoint", total=total, unit="bytes") as task:
            write_files(unfinished / TOKENIZER, tokenizer_files)
            write_parameters(unfinished / PARAMS, parameters, task)
            sync_tree(unfinished)
            os.replace(unfinished, path)  # fails if something has appeared there meanwhile
            mine = path
            sync(path.parent)
            _write_manifest(path, manifest)
        mine = None
    except OSError as error:
        raise ModelError(f"cannot write the checkpoint {path}: {error.strerror or error}") from None
    finally:
        if mine is not None:
            shutil.rmtree(mine, ignore_errors=True)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Completes a checkpoint, in one step."""
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
    sync(unfinished)
    os.replace(unfinished, folder / MANIFEST)
    sync(folder)
