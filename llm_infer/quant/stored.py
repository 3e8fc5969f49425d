"""Matrices of all layers in the form in which their file stores them, for kernels that multiply with that form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.quant_matmul import FORMATS, Norm, dequantise, switched_matmul
from pallas_kernels.quant_matmul.formats import DENSE
from pallas_kernels.quant_matmul.tiles import can_tile, take_rows, untile

_META = ["kinds", "places", "precision", "tiled"]


@partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=_META)
@dataclass(frozen=True)
class StoredWeights:
    """Matrices [L, N, K], never dequantised as a whole; a pytree, so it travels like an array.

    Files that keep some layers in more bits than others (the "_M" types of llama.cpp) need one stack a kind.

    Attributes:
        blocks: a stack [layers of this kind, N, R] for each entry of `kinds`.
        kinds: keys of `pallas_kernels.quant_matmul.FORMATS`.
        places: for each layer its stack and its index there.
        precision: how to multiply, see `quant_matmul`.
        tiled: for each entry of `kinds`, whether its rows have the tiled order (`pallas_kernels.quant_matmul.tiles`).
            Empty where none have.
    """

    blocks: tuple[Shaped[Array, "_ N R"], ...]
    kinds: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    precision: str = "exact"
    tiled: tuple[bool, ...] = ()

    def is_tiled(self, stack: int) -> bool:
        """Tells whether the rows of a stack have the tiled order."""
        return bool(self.tiled) and self.tiled[stack]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, N, K) of the weights."""
        first = self.blocks[0]
        return len(self.places), first.shape[1], FORMATS[self.kinds[0]].row_elements(first.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take."""
        return sum(block.nbytes for block in self.blocks)

    def matmul(
        self,
        x: Float[Array, "T K"],
        layer: Int[Array, ""] | int,
        part: tuple[int, Array] | None = None,
        gate: Float[Array, "T K"] | None = None,
        norm: Norm | None = None,
    ) -> Array:
        """Computes `x @ weights[layer].T` in float32, [T, N].

        Args:
            x: activations.
            layer: index of the layer.
            part: (P, p) takes the p-th of P equal runs of rows of the layer's matrix, e.g. one expert's.
            gate: silu(gate) · x takes the place of x.
            norm: x is normalised first.
        """
        if len(self.places) == 1:  # it was cut out for the layer that is computed
            layer = 0
        x, gate = x.astype(jnp.float32), None if gate is None else gate.astype(jnp.float32)
        stack, index = jnp.int32(0), jnp.asarray(layer, jnp.int32)
        if len(self.blocks) > 1:
            stack, index = (jnp.asarray(column)[layer] for column in np.array(self.places, np.int32).T)
        blocks, tiled = list(self.blocks), [self.is_tiled(each) for each in range(len(self.blocks))]
        if part is not None:
            count, number = part
            index = index * count + number
            for each, kind in enumerate(self.kinds):
                if tiled[each] and not can_tile(kind, blocks[each].shape[1] // count):
                    blocks[each], tiled[each] = untile(blocks[each], kind), False
                blocks[each] = blocks[each].reshape(blocks[each].shape[0] * count, -1, blocks[each].shape[2])
        how: dict[str, Any] = {"kinds": self.kinds, "precision": self.precision, "tiled": tiled}
        return switched_matmul(x, blocks, stack, index, gate, norm, **how)

    def rows(self, ids: Int[Array, " T"]) -> Float[Array, "T K"]:
        """Returns the rows of the only layer's matrix as float32; ids outside are clipped."""
        (blocks,), kind = self.blocks, self.kinds[0]
        blocks = blocks.reshape(blocks.shape[1:])
        if self.is_tiled(0):
            return dequantise(take_rows(blocks, ids, kind), kind)
        return dequantise(jnp.take(blocks, ids, axis=0, mode="clip"), kind)


def store_dense(array: Shaped[Array, "*L N K"], precision: str = "exact", cuts: int = 1) -> StoredWeights | None:
    """Returns a dense matrix or stack of them as it is; None where the kernels do not take it, or a `cuts`-th of its rows."""
    kind = DENSE.get(array.dtype.name)
    if kind is None or array.shape[-1] % (cuts * FORMATS[kind].elements):
        return None
    stack = array if array.ndim == 3 else array[None]
    return StoredWeights((stack,), (kind,), tuple((0, layer) for layer in range(stack.shape[0])), precision)


def plain_array(value: Any) -> Any:
    """Returns a dense matrix that kernels were handed as the array that it is; all else as it is."""
    if not isinstance(value, StoredWeights) or len(value.blocks) > 1 or value.kinds[0] not in DENSE.values():
        return value
    array = next(iter(value.blocks))
    return array[0] if len(value.places) == 1 and array.shape[0] == 1 else array
