"""The OPT decoder: learned positions, LayerNorm, biases everywhere, ReLU; the 350m size normalises after each sum."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llm_infer.models.decoder import Attend, Attention, Cache, Decoder
from llm_infer.models.families.opt import POSITION_OFFSET, OPTConfig
from llm_infer.models.layers import Embedding, Layer, LayerNorm, Linear, parameter, product
from llm_infer.models.rotary import Angles
from llm_infer.parallel.collectives import MeshAxes


class OPTLayers(nnx.Module):
    """All layers at once, as `DecoderLayers`."""

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike) -> None:
        layers, width, inner = config.num_layers, config.hidden_size, config.intermediate_size
        self.attn_norm = LayerNorm(layers, width, eps=config.norm_eps, dtype=dtype)
        # Checkpoints written before `output_bias` do not have the field.
        self.attn = Attention(replace(config, output_bias=True), dtype=dtype)
        self.mlp_norm = LayerNorm(layers, width, eps=config.norm_eps, dtype=dtype)
        self.mlp = PlainMLP(layers, width, inner, reduce=config.shards.axes, dtype=dtype)
        self.pre_norm = config.pre_norm

    def __call__(
        self, x: Float[Array, "T E"], angles: Angles, cache: Cache, layer: Layer, attend: Attend
    ) -> tuple[Float[Array, "T E"], Cache]:
        with jax.named_scope("attention"):
            normed = self.attn_norm(x, layer) if self.pre_norm else x
            out, cache = self.attn(normed, angles, cache, layer, attend)
            x = x + out if self.pre_norm else self.attn_norm(x + out, layer)
        with jax.named_scope("mlp"):
            out = self.mlp(self.mlp_norm(x, layer) if self.pre_norm else x, layer)
            return x + out if self.pre_norm else self.mlp_norm(x + out, layer), cache


class PlainMLP(nnx.Module):
    """down(relu(up(x))), with biases."""

    def __init__(self, layers: int, width: int, inner: int, *, reduce: MeshAxes, dtype: DTypeLike) -> None:
        self.up = Linear(layers, inner, width, axes=("mlp", "embed"), bias=True, dtype=dtype)
        self.down = Linear(layers, width, inner, axes=("embed", "mlp"), bias=True, reduce=reduce, dtype=dtype)

    def __call__(self, x: Float[Array, "T E"], layer: Layer) -> Float[Array, "T E"]:
        return self.down(jax.nn.relu(self.up(x, layer)), layer)


class Projection(nnx.Module):
    """One matrix `weight: [O, I]` that belongs to no layer; `axes` are the logical axes of O and I."""

    def __init__(self, out_features: int, in_features: int, *, axes: tuple[str, str], dtype: DTypeLike) -> None:
        self.weight = parameter((out_features, in_features), axes, dtype=dtype, std=in_features**-0.5)

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        return product(x, self.weight[...][None], 0)


class OPTDecoder(Decoder):
    """`Decoder` with OPT's layers, beginning and end."""

    config: OPTConfig

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike) -> None:
        nnx.Module.__init__(self)
        width, narrow = config.hidden_size, config.embedding_size
        self.config = config
        vocab_axes = ("vocab", "narrow" if narrow != width else "embed")
        self.embed = Embedding(config.vocab_size, narrow, axes=vocab_axes, shards=config.shards, dtype=dtype)
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.positions = Embedding(positions, width, axes=("positions", "embed"), dtype=dtype)
        self.layers = OPTLayers(config, dtype=dtype)
        if narrow != width:
            self.project_in = Projection(width, narrow, axes=("embed", "narrow"), dtype=dtype)
            self.project_out = Projection(narrow, width, axes=("narrow", "embed"), dtype=dtype)
        if config.pre_norm:
            self.final_norm = LayerNorm(None, width, eps=config.norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.head = Embedding(config.vocab_size, narrow, axes=vocab_axes, shards=config.shards, dtype=dtype)

    def embed_tokens(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T E"]:
        """Adds the token embedding, widened if need be, and the learned embedding of the position."""
        x = self.embed(token_ids)
        if self.config.embedding_size != self.config.hidden_size:
            x = self.project_in(x)
        return x + self.positions(positions + POSITION_OFFSET)

    def normed(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """Computes hidden states after the final norm, where there is one."""
        return self.final_norm(x) if self.config.pre_norm else x

    def logits(self, x: Float[Array, "S E"]) -> Float[Array, "S V"]:
        """Scores of every token of the vocabulary, float32."""
        with jax.named_scope("head"):
            x = self.normed(x)
            if self.config.embedding_size != self.config.hidden_size:
                x = self.project_out(x)
            return (self.embed if self.config.tie_word_embeddings else self.head).logits(x)
