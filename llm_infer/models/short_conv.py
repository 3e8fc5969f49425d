"""Gated short convolutions: what mixes the tokens of some layers in place of attention (Liquid AI, LFM2, 2025)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llm_infer.models.config import ModelConfig
from llm_infer.models.layers import Cache, Layer, Linear, Normed, parameter, pick


@runtime_checkable
class Convolve(Protocol):
    """What the `attend` of a model with short convolutions has beside `Attend`. The caller owns where the last inputs lie."""

    def causal_conv(
        self, inputs: Float[Array, "T C"], taps: Float[Array, "C K"], cache: Cache, layer: Layer, /
    ) -> tuple[Float[Array, "T C"], Cache]:
        """Computes y[t] = Σ_k taps[:, k] · x[t - K + 1 + k] within each sequence, and keeps what its next tokens will see.

        Args:
            inputs: x of this step's tokens; before a sequence's first all are zero.
            taps: of the layer, in the order of tokens: the last is of the token itself.
            layer: its number among the layers with convolutions.
        """
        ...


class ShortConv(nnx.Module):
    """out(c(x) · conv(b(x) · x(x))) over stacked weights; devices have each their channels C of the E."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike) -> None:
        layers, width, bias = len(config.layers_of("conv")), config.hidden_size, config.conv_bias
        axes = ("channels", "embed")
        self.b = Linear(layers, width, width, axes=axes, bias=bias, dtype=dtype)
        self.c = Linear(layers, width, width, axes=axes, bias=bias, dtype=dtype)
        self.x = Linear(layers, width, width, axes=axes, bias=bias, dtype=dtype)
        std = config.conv_taps**-0.5
        self.taps = parameter((layers, width, config.conv_taps), ("layers", "channels", "taps"), dtype=dtype, std=std)
        self.taps_bias = parameter((layers, width), ("layers", "channels"), dtype=dtype) if bias else None
        reduce = config.shards.axes
        self.out = Linear(layers, width, width, axes=("embed", "channels"), bias=bias, reduce=reduce, dtype=dtype)

    def __call__(
        self, x: Float[Array, "T E"] | Normed, cache: Cache, layer: Layer, convolve: Convolve
    ) -> tuple[Float[Array, "T E"], Cache]:
        """Computes one layer; `layer` is its number among those with convolutions."""
        inputs = self.b(x, layer) * self.x(x, layer)
        mixed, cache = convolve.causal_conv(inputs, pick(self.taps[...], layer), cache, layer)
        if self.taps_bias is not None:
            mixed = mixed + pick(self.taps_bias[...], layer)[None]
        return self.out(self.c(x, layer) * mixed, layer), cache
