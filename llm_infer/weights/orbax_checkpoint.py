"""Orbax checkpoints of stacked parameters: complete or not there at all, and loaded by mapping their files.

    DEST/llm_infer.json   format version, model configuration, type of the parameters; written last, it completes DEST
    DEST/tokenizer/       tokenizer and chat template
    DEST/params/          an Orbax PyTree checkpoint: one uncompressed Zarr array per parameter

An array written from one device is one file of raw values. It is mapped and becomes the JAX array without being read
or copied, which is some twenty times faster than Orbax's restore and needs no import of Orbax. An array written from a
mesh is in several files, which Orbax puts together; so it does where others wrote `params` in another of its layouts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress, Task
from llm_infer.weights.default_model import directory_bytes
from llm_infer.weights.orbax_tree import Leaf, OrbaxTree, in_other_layout
from llm_infer.weights.reports import tensor_report
from llm_infer.weights.zarr_arrays import DAMAGED, StoredArray, check_size, read_header, touch_pages

if TYPE_CHECKING:  # JAX and Orbax take seconds to import, and telling a directory's kind needs neither
    import jax

    from llm_infer.weights.rules import HasShape

MANIFEST = "llm_infer.json"
FORMAT_VERSION = 1
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""Types in which parameters are stored."""

PARAMS, TOKENIZER = "params", "tokenizer"


def is_checkpoint(directory: Path) -> bool:
    """Checks by its manifest whether a directory is a finished checkpoint."""
    return (directory / MANIFEST).is_file()


def why_no_checkpoint(directory: Path) -> str | None:
    """Says what is wrong with a directory that looks like a checkpoint and has no manifest; None for any other directory."""
    if (directory / PARAMS).is_dir() and (directory / TOKENIZER).is_dir():
        return f"{directory} is what an interrupted `llm-infer convert` left: remove it and convert again"
    if any((directory / name).exists() for name in ("_CHECKPOINT_METADATA", "_METADATA")):
        return f"{directory} is an Orbax checkpoint without {MANIFEST}: expected one written by `llm-infer convert`"
    return None


class Checkpoint:
    """An open checkpoint; a `TensorSource` whose tensors are the stacked parameters.

    Attributes:
        model: the model's configuration as it was given to `write_checkpoint`.
        stored_dtype: type of the parameters; some may be float32 beside it.
        tokenizer_directory: where the tokenizer's files are.
    """

    def __init__(self, path: Path) -> None:
        """Reads the manifest.

        Raises:
            ModelError: the directory is no checkpoint, or a newer or a damaged one.
        """
        self.path = path
        manifest = read_header(path / MANIFEST)
        version = manifest.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ModelError(
                f"{path} has format version {version}, expected at most {FORMAT_VERSION}: it was written by a newer "
                "llm_infer; update this one, or convert the model again"
            )
        if type(version) is not int or version < 1:
            raise ModelError(f"{path / MANIFEST}: version {version!r:.60}, expected a whole number from 1; {DAMAGED}")
        try:
            self.stored_dtype = DTYPES[manifest["dtype"]]
            self.model: dict[str, Any] = dict(manifest["model"])
            files = dict(manifest["tokenizer"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path / MANIFEST}: no valid entry for {str(error)[:60]}; {DAMAGED}") from None
        self.tokenizer_directory = path / TOKENIZER
        for name, size in files.items():
            # Only files below the directory are allowed: a manifest must not make us look elsewhere.
            if (
                not name
                or "\0" in name
                or Path(name).is_absolute()
                or ".." in Path(name).parts
                or type(size) is not int
            ):
                raise ModelError(
                    f"{path / MANIFEST}: tokenizer[{name[:60]!r}]={size!r:.60}, expected files below {TOKENIZER} and their "
                    f"sizes; {DAMAGED}"
                )
            check_size(self.tokenizer_directory / name, size)
        self._arrays: dict[str, StoredArray | Leaf] = {}
        self._tree = OrbaxTree(path / PARAMS)
        self._of_others = in_other_layout(path / PARAMS) and bool(self._tree.leaves)  # what is unreadable, is said now

    @property
    def names(self) -> list[str]:
        """Names of all stored parameters."""
        folder = self.path / PARAMS
        if self._of_others:
            return sorted(self._tree.leaves)
        return sorted(f.name for f in folder.iterdir() if (f / ".zarray").exists()) if folder.is_dir() else []

    @property
    def description(self) -> str:
        """The directory, for messages."""
        return str(self.path)

    def array(self, name: str) -> StoredArray | Leaf:
        """Returns a parameter as it is stored; its files are checked."""
        if name not in self._arrays:
            found = self._tree.leaves[name] if self._of_others else StoredArray.open(self.path / PARAMS / name)
            self._arrays[name] = found
        return self._arrays[name]

    def values(self, name: str) -> np.ndarray:
        """Returns the values of a parameter on the host, mapped where they are one file."""
        array = self.array(name)
        if isinstance(array, StoredArray) and array.single_file is not None:
            return array.map(array.single_file)
        return np.asarray(self._restored(name, None))

    def _restored(self, name: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
        """Restores a parameter by Orbax, however many files it has."""
        # One at a time: for all at once, Orbax takes 1.6 times their memory.
        try:
            return dict(self._tree.restore([name], shardings=sharding and {name: sharding}))[name]
        except ModelError as error:
            raise ModelError(f"{error}; {DAMAGED}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        return self.array(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of a parameter."""
        return self.array(name).dtype

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads a parameter and converts it to the type of `out`."""
        out[...] = self.values(name)

    def stored_kind(self, name: str) -> None:
        """Returns None: a checkpoint holds plain values only."""
        return None

    def stored(self, name: str) -> None:
        """Returns None, as `stored_kind` does."""
        return None

    def close(self) -> None:
        """Does nothing, as no file stays open; mapped memory goes away with the parameters."""

    def restore(
        self,
        specs: Mapping[str, HasShape],
        *,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        place: Callable[[str, np.ndarray], jax.Array] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, jax.Array]:
        """Restores all parameters of a model.

        On one CPU, parameters of the stored type are the mapped files, which take page cache but no memory of their own.

        Args:
            specs: parameter name → shape and type; the stored type is converted where this one differs.
            shardings: where each parameter goes, whatever mesh it was written from; None is the default device.
            place: moves the (mapped) values of a parameter to its devices, in place of `shardings`.
            progress: reports bytes of the checkpoint; None is silent.

        Raises:
            ModelError: parameters are missing, surplus or of another shape, or a file is damaged.
        """
        self._check(specs)
        total = sum(self.array(name).nbytes for name in specs)
        with (progress or Progress.silent()).task("Loading weights", total=total, unit="bytes") as task:
            return {
                name: self._restore(name, np.dtype(spec.dtype), (shardings or {}).get(name), place, task)
                for name, spec in specs.items()
            }

    def _restore(
        self,
        name: str,
        dtype: np.dtype,
        sharding: jax.sharding.Sharding | None,
        place: Callable[[str, np.ndarray], jax.Array] | None,
        task: Task,
    ) -> jax.Array:
        import jax

        from llm_infer.weights.aligned import aligned_empty

        array = self.array(name)
        if place is not None:
            result = place(name, self.values(name).astype(dtype, copy=False))
        elif array.single_file is None:
            result = self._restored(name, sharding).astype(dtype)
        else:
            values = self.values(name)
            if sharding is not None:
                result = jax.make_array_from_callback(
                    array.shape, sharding, lambda index: np.ascontiguousarray(values[index], dtype)
                )
            elif array.dtype == dtype:
                for done in touch_pages(values):
                    task.advance(done)
                return jax.device_put(values)
            else:
                converted = aligned_empty(array.shape, dtype)
                converted[...] = values
                result = jax.device_put(converted)
        task.advance(array.nbytes)
        return jax.block_until_ready(result)

    def _check(self, specs: Mapping[str, HasShape]) -> None:
        names = set(self.names)
        # Some parameters are float32 whatever the type of the others.
        some = any(self.dtype(name) == self.stored_dtype for name in names)
        types = {self.stored_dtype, DTYPES["float32"]} if some else {self.stored_dtype}
        problems = {
            "missing": sorted(specs.keys() - names),
            "surplus": sorted(names - specs.keys()),
            "wrong shape": [
                f"{name} {list(self.shape(name))} for {list(spec.shape)}"
                for name, spec in specs.items()
                if name in names and self.shape(name) != tuple(spec.shape)
            ],
            "wrong type": [
                f"{name} {self.dtype(name)} for {self.stored_dtype}"
                for name in specs
                if name in names and self.dtype(name) not in types
            ],
        }
        if any(problems.values()):
            raise ModelError(f"{self.path}: not the parameters of its model; {DAMAGED}; {tensor_report(problems)}")


def write_parameters(folder: Path, parameters: Mapping[str, jax.Array], task: Task) -> None:
    """Writes one uncompressed array per parameter; a compressed one could not be mapped."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with _watched(folder.parent, task), _quiet(logging.getLogger("absl")), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(dict(parameters)))


@contextmanager
def _watched(folder: Path, task: Task) -> Iterator[None]:
    """Reports the bytes that arrive in a folder while the block runs: Orbax has no progress of its own."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            task.set(directory_bytes(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keeps all but errors out: Orbax warns of a step that its plain format does not need."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
