"""Layers of a decoder over stacked weights: each takes `(stacked, layer)`, so no layer's weights are sliced out by the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llm_infer.models.config import UNCUT, ModelConfig, Shards
from llm_infer.parallel.axes import Axes, ParamSpec
from llm_infer.parallel.collectives import MeshAxes, first_of_part, gather_columns, sum_over
from llm_infer.quant import StoredWeights
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.numerics import is_invariant
from pallas_kernels.quant_matmul import Norm
from pallas_kernels.row_sums import mean_squares, row_sums

Layer = Int[Array, ""]

Cache = Any
"""Whatever `attend` reads and writes; the model passes it through. In the engine: the stacked pools, by group of layers."""


def place(layers: int, layer: Layer | int) -> Layer | int:
    """Returns a layer's index in a stack; where a stack has one layer, it was cut out for the layer that is computed."""
    return layer if layers > 1 else 0


def pick(stacked: Float[Array, "L ..."], layer: Layer | int) -> Float[Array, "..."]:
    """Returns a layer's array of a stack, see `place`."""
    return lax.dynamic_index_in_dim(stacked, place(stacked.shape[0], layer), keepdims=False)


def parameter(
    shape: tuple[int, ...], axes: Axes, *, dtype: DTypeLike, mean: float = 0.0, std: float = 0.0
) -> nnx.Param:
    """Declares a parameter: a module holds its `ParamSpec` until `merge_model` puts the array in its place."""
    return nnx.Param(ParamSpec(shape, jnp.dtype(dtype), axes, mean, std))


@dataclass(frozen=True)
class Normed:
    """Activations with an RMSNorm that the matrix which takes them may compute itself.

    Attributes:
        x: Float[Array, "... E"] before the norm.
        norm: that of the layer; weights of any type.
    """

    x: Array
    norm: Norm

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the activations."""
        return self.x.dtype

    def array(self) -> Array:
        """Computes the norm."""
        weight, layer, eps = self.norm
        return rms_norm(self.x, pick(weight, layer), eps)


def linear(
    x: Float[Array, "T I"] | Normed,
    stacked: Float[Array, "L O I"] | StoredWeights,
    layer: Layer,
    part: tuple[int, Array] | None = None,
    gate: Float[Array, "T I"] | None = None,
) -> Float[Array, "T _"]:
    """Computes `x @ stacked[layer].T`, accumulated in float32, in the dtype of `x`.

    `part` = (P, p) takes the p-th of P equal runs of rows: one expert's matrix of those that lie below each other.
    With a `gate`, silu(gate) · x takes the place of x.
    """
    if isinstance(x, Normed):
        float32 = x.dtype == jnp.float32 == x.norm.weight.dtype
        if isinstance(stacked, StoredWeights) and float32:
            return stacked.matmul(x.x, layer, part, norm=x.norm)
        x = x.array()
    if isinstance(stacked, StoredWeights):
        return stacked.matmul(x, layer, part, gate).astype(x.dtype)
    if gate is not None:
        x = silu(gate) * x
    if part is None:
        return product(x, stacked, layer)
    rows, own = stacked.shape[1] // part[0], place(stacked.shape[0], layer)
    alone = lax.dynamic_slice(stacked, (own, part[1] * rows, jnp.int32(0)), (1, rows, stacked.shape[2]))
    return product(x, alone, layer)


def product(
    x: Float[Array, "T I"], stacked: Float[Array, "L O I"], layer: Layer | int, dtype: DTypeLike | None = None
) -> Float[Array, "T O"]:
    """Computes `x @ stacked[layer].T`, accumulated in float32, in this dtype or that of `x`; `layer` as of `place`.

    Where a row must have the same bits in any company (`pallas_kernels.numerics`), the kernel of experts' matrices multiplies:
    its order of additions does not depend on T.
    """
    if is_invariant():
        own = place(stacked.shape[0], layer)
        return grouped_matmul(x, stacked, jnp.full((1,), x.shape[0], jnp.int32), own, dtype=dtype)
    weight = pick(stacked, layer)
    out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out.astype(x.dtype if dtype is None else dtype)


def rms_norm(
    x: Float[Array, "... E"], weight: Float[Array, " E"], eps: Array | float, cut: MeshAxes = ()
) -> Float[Array, "... E"]:
    """Divides by the root mean square, in float32 (Zhang and Sennrich, 2019). `cut` names mesh axes over which E is cut."""
    x32 = x.astype(jnp.float32)
    squares = mean_squares(x32)
    if cut:
        squares = lax.pmean(squares, cut)
    scale = lax.rsqrt(squares + eps)
    weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)
    return (x32 * scale * weight).astype(x.dtype)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes GELU by its tanh approximation (Hendrycks and Gimpel, 2016), in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes x · Φ(x), in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes x · sigmoid(x), in float32."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh, "gelu": gelu}
"""Activations of gated MLPs by the names that `ModelConfig.activation` has, but for "clamped"."""


def clamped(gate: Float[Array, "..."], up: Float[Array, "..."], limit: float, slope: float) -> Float[Array, "..."]:
    """Computes (u + 1) · g · sigmoid(slope · g) of gates g cut above the limit and u cut on both sides (gpt-oss, 2025)."""
    g = jnp.minimum(gate.astype(jnp.float32), limit)
    u = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return ((u + 1) * g * jax.nn.sigmoid(slope * g)).astype(up.dtype)


def gated(config: ModelConfig, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes what goes into the last matrix of a model's MLP."""
    if config.activation == "clamped":
        return clamped(gate, up, config.swiglu_limit, config.swiglu_slope)
    return ACTIVATIONS[config.activation](gate) * up


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Bounds numbers smoothly to ±cap; None leaves them as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Linear(nnx.Module):
    """Matrices of all layers, `weight: [L, O, I]` with a row per output feature, and maybe `bias: [L, O]`.

    `axes` are the logical axes of O and I. `reduce` names the mesh axes over which the input features are cut: the
    devices' results are summed.
    """

    def __init__(
        self,
        layers: int,
        out_features: int,
        in_features: int,
        *,
        axes: tuple[str, str],
        bias: bool = False,
        reduce: MeshAxes = (),
        dtype: DTypeLike,
    ) -> None:
        shape = (layers, out_features, in_features)
        self.weight = parameter(shape, ("layers", *axes), dtype=dtype, std=in_features**-0.5)
        self.bias = parameter(shape[:2], ("layers", axes[0]), dtype=dtype) if bias else None
        self.reduce = reduce

    def __call__(
        self, x: Float[Array, "T I"] | Normed, layer: Layer, gate: Float[Array, "T I"] | None = None
    ) -> Float[Array, "T O"]:
        out = sum_over(linear(x, self.weight.get_value(), layer, gate=gate), self.reduce)
        if self.bias is not None:
            out = out + pick(self.bias[...], layer)[None]
        return out


def norm_parameter(layers: int | None, features: int, axis: str, dtype: DTypeLike, mean: float) -> nnx.Param:
    """Declares a vector per layer, or a single one."""
    if layers is None:
        return parameter((features,), (axis,), dtype=dtype, mean=mean)
    return parameter((layers, features), ("layers", axis), dtype=dtype, mean=mean)


class RMSNorm(nnx.Module):
    """Scales of all layers, `weight: [L, E]`, or of a single norm, `weight: [E]` (`layers` None; call without layer).

    `axis` is the logical axis of the features.
    """

    def __init__(self, layers: int | None, features: int, *, axis: str = "embed", eps: float, dtype: DTypeLike) -> None:
        self.weight = norm_parameter(layers, features, axis, dtype, mean=1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... E"], layer: Layer | None = None) -> Float[Array, "... E"]:
        return rms_norm(x, self.weight[...], self.eps) if layer is None else self.later(x, layer).array()

    def over_heads(self, x: Float[Array, "T N D"], layer: Layer, cut: MeshAxes) -> Float[Array, "T N D"]:
        """Normalises all heads together, those of the other devices along `cut` included."""
        weight = pick(self.weight[...], layer)
        flat = x.reshape(x.shape[0], -1)
        return rms_norm(flat, weight, self.eps, cut).reshape(x.shape)

    def later(self, x: Float[Array, "... E"], layer: Layer) -> Normed:
        """Leaves the norm to the matrices that take x."""
        weight = self.weight[...]
        return Normed(x, Norm(weight, place(weight.shape[0], layer), self.eps))


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al., 2016) of all layers, `weight, bias: [L, E]`; [E] where `layers` is None."""

    def __init__(self, layers: int | None, features: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = norm_parameter(layers, features, "embed", dtype, mean=1.0)
        self.bias = norm_parameter(layers, features, "embed", dtype, mean=0.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "T E"], layer: Layer | None = None) -> Float[Array, "T E"]:
        weight, bias = self.weight[...], self.bias[...]
        if layer is not None:
            weight, bias = (pick(each, layer) for each in (weight, bias))
        x32 = x.astype(jnp.float32)
        mean = row_sums(x32) / x.shape[-1]
        centred = x32 - mean[..., None]
        scale = lax.rsqrt(mean_squares(x32, mean) + self.eps)
        out = centred * scale * weight.astype(jnp.float32)[None] + bias.astype(jnp.float32)[None]
        return out.astype(x.dtype)


class Embedding(nnx.Module):
    """A row per token, `weight: [V, E]`; also an output head. `shards` cuts the rows, filled up to equal parts.

    `axes` are the logical axes of rows and features: rows of another kind than tokens are not cut.
    """

    def __init__(
        self,
        vocab: int,
        features: int,
        *,
        axes: tuple[str, str] = ("vocab", "embed"),
        shards: Shards = UNCUT,
        dtype: DTypeLike,
    ) -> None:
        self.weight = parameter((shards.padded(vocab), features), axes, dtype=dtype, std=features**-0.5)
        self.vocab, self.axes = vocab, shards.axes

    def __call__(self, ids: Int[Array, " T"]) -> Float[Array, "T E"]:
        if not self.axes:
            return self._rows(ids)
        size = self.weight.get_value().shape[-2]
        own = ids - first_of_part(size, self.axes)
        here = (own >= 0) & (own < size)
        return sum_over(jnp.where(here[:, None], self._rows(own), 0), self.axes)

    def _rows(self, ids: Int[Array, " T"]) -> Float[Array, "T E"]:
        weight = self.weight.get_value()
        if isinstance(weight, StoredWeights):
            return weight.rows(ids)
        return jnp.take(weight, ids, axis=0, mode="clip")

    def logits(self, x: Float[Array, "S E"]) -> Float[Array, "S V"]:
        """Scores of every token, float32."""
        weight = self.weight.get_value()
        stored = isinstance(weight, StoredWeights)
        out = weight.matmul(x, 0) if stored else product(x, weight[None], 0, jnp.float32)
        return gather_columns(out, self.axes)[:, : self.vocab] if self.axes else out
