"""Trees of arrays in Orbax checkpoints, whatever their layout: what they hold, by dotted names, and their values.

Orbax writes OCDBT databases by default, else a folder of Zarr (version 2 or 3, compressed or not) for each array. The
keys that lead to an array are joined by dots; `value` or `raw_value` at the end, which holds what an NNX variable is, is
left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  numpy knows "bfloat16" by name once it is imported
import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.weights.zarr_arrays import DAMAGED, check_chunks

if TYPE_CHECKING:  # JAX and Orbax take seconds to import
    import jax

METADATA = "_METADATA"
"""File that describes a tree; the folder of every tree has it."""
_DATABASE = "manifest.ocdbt"
_VARIABLE = ("value", "raw_value")
BATCH_BYTES = 1 << 30
"""Most bytes that are restored together; Orbax takes 1.6 times as much memory."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """An array of a tree.

    Attributes:
        keys: those that lead to it.
        shape, dtype: of the whole array.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The number of bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def single_file(self) -> None:
        """None: there is no file that could be mapped."""
        return None


def is_tree(folder: Path) -> bool:
    """Checks whether a folder holds a tree."""
    return (folder / METADATA).is_file() or (folder / _DATABASE).is_file()


def in_other_layout(folder: Path) -> bool:
    """Tells whether a folder has its arrays in a database, as Zarr version 3, or under the names of NNX variables."""
    patterns = ("*/zarr.json", *(f"*.{name}/.zarray" for name in _VARIABLE))
    return (folder / _DATABASE).is_file() or any(any(folder.glob(pattern)) for pattern in patterns)


class OrbaxTree:
    """The arrays of one tree; numbers and texts beside them are left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @cached_property
    def _described(self) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
        """Keys and Orbax's description of each leaf, and the tree's structure."""
        import jax
        import orbax.checkpoint as ocp

        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree = getattr(checkpointer.metadata(self.folder).item_metadata, "tree", None)
        except Exception as error:  # of many types
            raise self._bad(error) from None
        if tree is None:
            raise self._bad("nothing describes its arrays")
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        return [(tuple(map(_key, path)), leaf) for path, leaf in leaves], structure

    @cached_property
    def leaves(self) -> dict[str, Leaf]:
        """The arrays by dotted name.

        Raises:
            ModelError: the tree cannot be read, or two arrays have the same name.
        """
        found: dict[str, Leaf] = {}
        for keys, leaf in self._described[0]:
            if not _is_array(leaf):
                continue
            name = ".".join(keys[:-1] if len(keys) > 1 and keys[-1] in _VARIABLE else keys)
            if name in found:
                raise ModelError(f"{self.folder}: {name} is there twice")
            found[name] = Leaf(keys, tuple(leaf.shape), np.dtype(leaf.dtype))
        return found

    def restore(
        self,
        names: Sequence[str],
        *,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        dtypes: Mapping[str, np.dtype] | None = None,
    ) -> Iterator[tuple[str, jax.Array]]:
        """Yields arrays with their names, some at a time.

        Args:
            names: those of `leaves`.
            shardings: where each array goes; the default device for those that have none.
            dtypes: to which types they are converted.

        Raises:
            ModelError: the tree is damaged.
            ValueError: an array cannot be cut so.
        """
        import jax

        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {name: (shardings or {}).get(name, place) for name in names}
        for name, sharding in wanted.items():
            sharding.shard_shape(self.leaves[name].shape)  # an error here is the caller's fault, later ones the file's
        self._check_files(names)
        batch: list[str] = []
        for name in names:
            if batch and sum(self.leaves[each].nbytes for each in (*batch, name)) > BATCH_BYTES:
                yield from self._restored(batch, wanted, dtypes or {})
                batch = []
            batch.append(name)
        yield from self._restored(batch, wanted, dtypes or {})

    def _restored(
        self, names: Sequence[str], shardings: Mapping[str, jax.sharding.Sharding], dtypes: Mapping[str, np.dtype]
    ) -> Iterator[tuple[str, jax.Array]]:
        """Restores arrays together."""
        import jax
        import orbax.checkpoint as ocp

        by_keys = {self.leaves[name].keys: name for name in names}
        described, structure = self._described
        items, arguments = [], []
        for keys, _ in described:
            name = by_keys.get(keys)
            items.append(ocp.PLACEHOLDER if name is None else 0)
            arguments.append(
                ocp.RestoreArgs()
                if name is None
                else ocp.ArrayRestoreArgs(
                    sharding=shardings[name], global_shape=self.leaves[name].shape, dtype=dtypes.get(name)
                )
            )
        request = ocp.args.PyTreeRestore(
            jax.tree.unflatten(structure, items), restore_args=jax.tree.unflatten(structure, arguments)
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored = structure.flatten_up_to(checkpointer.restore(self.folder, args=request))
        except Exception as error:  # of many types
            raise self._bad(error, ", ".join(names[:3])) from error
        for (keys, _), value in zip(described, restored, strict=True):
            if keys in by_keys:
                yield by_keys[keys], value

    def _check_files(self, names: Sequence[str]) -> None:
        """Checks that no file of values is missing: Zarr would take it for a run of fill values."""
        if (self.folder / _DATABASE).is_file() or not self._has_all_chunks():
            return
        for name in names:
            try:
                check_chunks(self.folder / ".".join(self.leaves[name].keys))
            except ModelError as error:
                raise self._bad(str(error).removesuffix(f"; {DAMAGED}"), name) from None

    def _has_all_chunks(self) -> bool:
        """Tells whether a chunk of zeros is a file like any other; older versions of Orbax left it out."""
        try:
            return json.loads((self.folder / METADATA).read_bytes())["store_array_data_equal_to_fill_value"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _bad(self, error: Exception | str, what: str = "it") -> ModelError:
        said = str(error).strip().splitlines()
        return ModelError(
            f"{self.folder}: Orbax cannot restore {what} ({said[0][:200] if said else type(error).__name__})"
        )


def _key(entry: Any) -> str:
    """Returns the text of one key of a path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _is_array(leaf: Any) -> bool:
    """Tells an array's description from that of a single number, a text or nothing."""
    return getattr(leaf, "shape", None) is not None and type(leaf).__name__ == "ArrayMetadata"
