"""Rules that say which tensors of a model file make up a parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from einops import rearrange

Arrange = Callable[[Sequence[np.ndarray]], np.ndarray]
Make = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


class HasShape(Protocol):
    """Shape and type of a parameter: a `ParamSpec`, a `jax.ShapeDtypeStruct` …"""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """One parameter and its tensors.

    Attributes:
        param: name of the parameter, e.g. "layers.o.weight".
        sources: names of the tensors. With `{layer}` in them the parameter is stacked, [L, …], and the rule is applied
            to each layer; either all of the names have it or none.
        arrange: makes the parameter (of one layer) of the tensors, in the order of `sources`; None takes the only one
            as it is. It must work for every float type and decide by shapes alone.
        layers: those that have it; None: all.
        back: makes the tensors again of the parameter, in its place alone; None where `arrange` does but move whole rows of
            these and others of the same tensors, which `undo_rules` undoes itself.
        optional: the parameter may be absent from the file; then it is left out of what the loader returns. A
            parameter that the model does not have (no spec) is skipped, and its tensors are not surplus.
    """

    param: str
    sources: tuple[str, ...]
    arrange: Arrange | None = None
    optional: bool = False
    layers: Sequence[int] | None = None
    back: Make | None = None

    def __post_init__(self) -> None:
        if not self.sources or (self.arrange is None and len(self.sources) != 1):
            raise ValueError(f"rule for {self.param}: {len(self.sources)} sources need an `arrange`")
        if len({"{layer}" in source for source in self.sources}) != 1:
            raise ValueError(f"rule for {self.param}: either all source names contain {{layer}} or none")

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading axis of layers."""
        return "{layer}" in self.sources[0]

    def tensor_names(self, num_layers: int) -> list[tuple[str, ...]]:
        """Returns the names of the tensors, see `names_by_layer`."""
        return names_by_layer(self.sources, num_layers, self.layers)


def names_by_layer(
    names: tuple[str, ...], num_layers: int, layers: Sequence[int] | None = None
) -> list[tuple[str, ...]]:
    """Returns names with the numbers of these of a model's layers, one tuple per layer; one in all without `{layer}`."""
    if "{layer}" not in names[0]:
        return [names]
    numbers = range(num_layers) if layers is None else [layer for layer in layers if layer < num_layers]
    return [tuple(name.replace("{layer}", str(layer)) for name in names) for layer in numbers]


def fuse_qkv(num_kv_heads: int, head_dim: int) -> Arrange:
    """Arranges q [Hq·D, …], k [Hkv·D, …], v [Hkv·D, …] as [(Hq+2·Hkv)·D, …], rows grouped per KV head [q…q|k|v].

    The order lets a tensor-parallel mesh cut the fused matrix between KV heads. Works for matrices and biases.

    Raises (when applied):
        ValueError: the rows do not divide into the heads.
    """

    def arrange(tensors: Sequence[np.ndarray]) -> np.ndarray:
        grouped = []
        for tensor in tensors:
            if tensor.shape[0] % (num_kv_heads * head_dim):
                raise ValueError(f"{tensor.shape[0]} rows for {num_kv_heads} KV heads of size {head_dim}")
            grouped.append(rearrange(tensor, "(h r) ... -> h r ...", h=num_kv_heads))
        return rearrange(np.concatenate(grouped, axis=1), "h r ... -> (h r) ...")

    return arrange
