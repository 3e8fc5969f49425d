"""Shows the experts of gpt-oss's safetensors files one by one: their matrices lie in three axes, or in blocks of MXFP4."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.weights.array_source import ArraySource
from llm_infer.weights.safetensors_files import SafetensorsSource
from pallas_kernels.quant_matmul.formats import FORMATS, VALUES

_STACK = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj(|_bias|_blocks|_scales)")
_BLOCK = FORMATS["mxfp4"]
"""A block of 32 weights: GGUF has the exponent first, and weight i beside weight i + 16 in a byte; these files i beside i + 1."""


class ExpertTensors:
    """The tensors of a model whose experts are `experts.N.gate_proj.weight` and so on, as in other families (a `TensorSource`).

    Matrices in the file are [X, in, out], their gates and ups one after the other in the columns; or [X, out, in / 32, 16] bytes
    of two weights each, with scales [X, out, in / 32], exponents of two plus 127 (OCP microscaling formats, 2023).
    """

    def __init__(self, source: SafetensorsSource | ArraySource) -> None:
        self._source = source
        self._parts: dict[str, tuple[str, int, int | None]] = {}
        """Name → the stack's name up to `_proj`, the expert, and 0 for gates, 1 for ups, None for down."""
        self._stacks = {name: found.groups() for name in source.names if (found := _STACK.fullmatch(name))}
        self._others = set(source.names) - self._stacks.keys()
        for name, (base, which, suffix) in self._stacks.items():
            if suffix == "_scales":
                continue
            part = "bias" if suffix == "_bias" else "weight"
            halves = {"gate": 0, "up": 1} if which == "gate_up" else {"down": None}
            self._check(name, base, which, suffix)
            for expert in range(source.shape(name)[0]):
                for half, offset in halves.items():
                    self._parts[f"{base}.{expert}.{half}_proj.{part}"] = (f"{base}.{which}_proj", expert, offset)

    def _check(self, name: str, base: str, which: str, suffix: str) -> None:
        """Raises ModelError for a stack whose axes or scales are not those of experts."""
        source, shape = self._source, self._source.shape(name)
        axes = {"": 3, "_bias": 2, "_blocks": 4}[suffix]
        if len(shape) != axes:
            raise ModelError(f"{source.description}: {name} has shape {list(shape)}, expected {axes} axes")
        if suffix != "_blocks":
            return
        scales = f"{base}.{which}_proj_scales"
        found = source.shape(scales) if scales in self._stacks else None
        bytes_ = found is not None and source.dtype(name) == source.dtype(scales) == np.uint8
        if not bytes_ or found != shape[:3] or shape[3] != _BLOCK.elements // 2:
            raise ModelError(
                f"{source.description}: {name} {list(shape)} and {scales} {'absent' if found is None else list(found)}: expected "
                f"bytes [experts, rows, blocks, {_BLOCK.elements // 2}] and [experts, rows, blocks]"
            )

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return [*self._others, *self._parts]

    @property
    def description(self) -> str:
        """The directory, or the files."""
        return self._source.description

    def _rows(self, name: str) -> np.ndarray:
        """Returns a view of an expert's rows [out, in], or its bias [out]."""
        stack, expert, offset = self._parts[name]
        array = self._source.array(stack + ("_bias" if name.endswith("bias") else ""))[expert]
        rows = array if name.endswith("bias") else array.T
        return rows if offset is None else rows[offset::2]

    def _packed(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns a matrix's blocks [out, in / 32, 16] and scales [out, in / 32]; None where it is not in blocks."""
        if self.stored_kind(name) is None:
            return None
        stack, expert, offset = self._parts[name]
        blocks, scales = (self._source.array(f"{stack}_{each}")[expert] for each in ("blocks", "scales"))
        return (blocks, scales) if offset is None else (blocks[offset::2], scales[offset::2])

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        if name in self._others:
            return self._source.shape(name)
        if (packed := self._packed(name)) is not None:
            rows, blocks = packed[1].shape
            return rows, blocks * _BLOCK.elements
        return self._rows(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of the values as read; float32 for blocks."""
        if name in self._others:
            return self._source.dtype(name)
        return np.dtype(np.float32) if self._packed(name) is not None else self._rows(name).dtype

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads all values into `out`, which has the tensor's shape, and converts them to its type."""
        if name in self._others:
            self._source.read_into(name, out)
        elif (packed := self._packed(name)) is not None:
            blocks, scales = packed
            twice = np.array(VALUES["mxfp4"], np.float32)[_codes(blocks)]
            out[...] = np.ldexp(twice, scales.astype(np.int32)[..., None] - 128).reshape(out.shape)
        else:
            np.copyto(out, self._rows(name), casting="unsafe")

    def stored_kind(self, name: str) -> str | None:
        """Returns "mxfp4" for an expert's matrix in blocks; None for other tensors."""
        if name in self._others or name.endswith("bias") or f"{self._parts[name][0]}_blocks" not in self._stacks:
            return None
        return "mxfp4"

    def stored(self, name: str) -> tuple[str, np.ndarray] | None:
        """Returns such a matrix as GGUF stores MXFP4, [out, in / 32 · 17]; None for other tensors."""
        if (packed := self._packed(name)) is None:
            return None
        codes, scales = _codes(packed[0]), packed[1]
        rows = np.concatenate((scales[..., None], codes[..., :16] | codes[..., 16:] << 4), axis=-1)
        return "mxfp4", rows.reshape(rows.shape[0], -1)

    def same_values(self, name: str, other: str) -> bool:
        """Checks whether two tensors, none of them an expert's, have the same shape and values."""
        return self._source.same_values(name, other)

    def close(self) -> None:
        """Lets go of the files."""
        self._source.close()


def _codes(blocks: np.ndarray) -> np.ndarray:
    """Turns [..., 16] bytes into the four bits of each of their 32 weights."""
    return np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:-1], _BLOCK.elements)
