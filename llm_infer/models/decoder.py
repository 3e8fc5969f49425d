"""The decoder that all model families share: embed, layers of attention and MLP over stacked weights, norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llm_infer.models.config import ModelConfig
from llm_infer.models.experts import ExpertsMLP
from llm_infer.models.layers import (
    Embedding,
    Layer,
    Linear,
    RMSNorm,
    rope_angles,
    rope_frequencies,
    rotate,
)

Cache = Any
"""Whatever `attend` reads and writes; the model passes it through. In the engine: the stacked page pool."""

Attend = Callable[[Array, Array, Array, Cache, Layer], tuple[Array, Cache]]
"""`attend(q[T,Hq,D], k[T,Hkv,D], v[T,Hkv,D], cache, layer) -> (out[T,Hq,D], cache)`: writes k and v, attends causally."""

LayerLoop = int | Literal["unroll"]
"""Layers that one iteration of the loop over layers computes, or "unroll": no loop, every layer's number is a constant."""

Angles = tuple[Float[Array, "T H"], Float[Array, "T H"]] | None
"""Cosine and sine of each position's rotation, [T, D/2]; None for models without rotary positions."""


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023); the cache and what attends over it are the caller's."""

    def __init__(self, config: ModelConfig, *, output_bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        layers, width = config.num_layers, config.hidden_size
        query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.qkv_bias
        if config.fused_qkv:
            self.qkv = Linear(layers, query_rows + 2 * kv_rows, width, bias=bias, dtype=dtype, rngs=rngs)
        else:
            self.q = Linear(layers, query_rows, width, bias=bias, dtype=dtype, rngs=rngs)
            self.k = Linear(layers, kv_rows, width, bias=bias, dtype=dtype, rngs=rngs)
            self.v = Linear(layers, kv_rows, width, bias=bias, dtype=dtype, rngs=rngs)
        reduce = config.shards.axes
        self.o = Linear(layers, width, query_rows, bias=output_bias, reduce=reduce, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(layers, config.head_dim, eps=config.norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(layers, config.head_dim, eps=config.norm_eps, dtype=dtype)
        self.config = config

    def project(self, x: Float[Array, "T E"], layer: Layer) -> tuple[Array, Array, Array]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D] of this device's heads, before the rotation."""
        config, tokens = self.config, x.shape[0]
        if config.fused_qkv:
            # Rows are grouped per KV head, so a shard of heads is a contiguous run of rows.
            group = config.group_size
            grouped = self.qkv(x, layer).reshape(tokens, -1, group + 2, config.head_dim)
            query, key, value = grouped[:, :, :group], grouped[:, :, group], grouped[:, :, group + 1]
            return query.reshape(tokens, -1, config.head_dim), key, value
        shape = (tokens, -1, config.head_dim)
        return self.q(x, layer).reshape(shape), self.k(x, layer).reshape(shape), self.v(x, layer).reshape(shape)

    def __call__(
        self, x: Float[Array, "T E"], angles: Angles, cache: Cache, layer: Layer, attend: Attend
    ) -> tuple[Float[Array, "T E"], Cache]:
        query, key, value = self.project(x, layer)
        if self.config.qk_norm:
            query, key = self.q_norm(query, layer), self.k_norm(key, layer)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        out, cache = attend(query, key, value, cache, layer)
        return self.o(out.reshape(x.shape[0], -1), layer), cache


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer, 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        layers, width, inner = config.num_layers, config.hidden_size, config.intermediate_size
        self.gate = Linear(layers, inner, width, dtype=dtype, rngs=rngs)
        self.up = Linear(layers, inner, width, dtype=dtype, rngs=rngs)
        self.down = Linear(layers, width, inner, reduce=config.shards.axes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T E"], layer: Layer) -> Float[Array, "T E"]:
        return self.down(self.up(x, layer), layer, gate=self.gate(x, layer))


class DecoderLayers(nnx.Module):
    """All layers at once: every weight is stacked, `__call__` computes the one that `layer` names."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        layers, width = config.num_layers, config.hidden_size
        self.attn_norm = RMSNorm(layers, width, eps=config.norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(layers, width, eps=config.norm_eps, dtype=dtype)
        mlp = GatedMLP if config.moe is None else ExpertsMLP
        self.mlp = mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T E"], angles: Angles, cache: Cache, layer: Layer, attend: Attend
    ) -> tuple[Float[Array, "T E"], Cache]:
        with jax.named_scope("attention"):
            out, cache = self.attn(self.attn_norm(x, layer), angles, cache, layer, attend)
            x = x + out
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x, layer), layer), cache


class Decoder(nnx.Module):
    """A decoder-only transformer as a function of its parameters.

    `split_model` gives the definition and the parameters apart; `merge_model` puts them together inside a traced
    function. A family that begins or ends differently overrides `embed_tokens`, `angles` or `logits`.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, shards=config.shards, dtype=dtype, rngs=rngs)
        self.layers = DecoderLayers(config, dtype=dtype, rngs=rngs)
        self.final_norm = RMSNorm(None, config.hidden_size, eps=config.norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.head = Embedding(config.vocab_size, config.hidden_size, shards=config.shards, dtype=dtype, rngs=rngs)

    def embed_tokens(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T E"]:
        """Input of the first layer."""
        return self.embed(token_ids)

    def angles(self, positions: Int[Array, " T"]) -> Angles:
        """What the layers need to know of the positions; computed once, not per layer."""
        if self.config.rope is None:
            return None
        return rope_angles(positions, rope_frequencies(self.config.rope, self.config.head_dim))

    def __call__(
        self,
        token_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        cache: Cache,
        attend: Attend,
        *,
        loop: LayerLoop = 1,
    ) -> tuple[Float[Array, "T E"], Cache]:
        """Hidden state of every token after the last layer (before the final norm), and the cache."""
        x = self.embed_tokens(token_ids, positions)
        angles = self.angles(positions)

        def block(carry: tuple[Array, Cache], layer: Layer) -> tuple[tuple[Array, Cache], None]:
            return self.layers(carry[0], angles, carry[1], layer, attend), None

        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        if loop == "unroll":
            for index in range(self.config.num_layers):
                (x, cache), _ = block((x, cache), jnp.int32(index))
        else:
            (x, cache), _ = lax.scan(block, (x, cache), layers, unroll=loop)
        return x, cache

    def normed(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """Hidden states after the final norm: what the head reads, and what embeddings are made of."""
        return self.final_norm(x)

    def logits(self, x: Float[Array, "S E"]) -> Float[Array, "S V"]:
        """Scores of every token of the vocabulary, float32."""
        with jax.named_scope("head"):
            head = self.embed if self.config.tie_word_embeddings else self.head
            return head.logits(self.normed(x))
