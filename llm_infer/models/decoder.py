"""The decoder that all model families share: embed, layers of attention and MLP over stacked weights, norm, head."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llm_infer.models.config import ModelConfig
from llm_infer.models.experts import ExpertsMLP
from llm_infer.models.layer_runs import Run, layer_runs, own_number
from llm_infer.models.layers import Cache, Embedding, Layer, Linear, Normed, RMSNorm, gated, parameter, pick, softcap
from llm_infer.models.rotary import Angles, angles_of, rotate
from llm_infer.models.rotary import angles as rope_angles
from llm_infer.models.short_conv import Convolve, ShortConv


@runtime_checkable
class Attend(Protocol):
    """What a model attends with. The model owns the scale and what a layer may see; the caller owns where K and V lie.

    For models with short convolutions it is a `Convolve` too.
    """

    def __call__(
        self,
        query: Float[Array, "T Hq D"],
        key: Float[Array, "T Hkv D"],
        value: Float[Array, "T Hkv D"],
        cache: Cache,
        layer: Layer,
        /,
        *,
        scale: float,
        window: Array | int | None = None,
        softcap: float | None = None,
        sinks: Float[Array, " Hq"] | None = None,
    ) -> tuple[Float[Array, "T Hq D"], Cache]:
        """Writes a layer's keys and values and attends causally; arguments as of `paged_attention`.

        `layer` is the number among the layers that attend.
        """
        ...


EVERYTHING = 2**30
"""A window that hides nothing, for layers that see all beside layers that do not."""

LayerLoop = int | Literal["unroll"]
"""Layers that one iteration of the loop over layers computes, or "unroll": no loop, every layer's number is a constant."""


def norm(config: ModelConfig, layers: int | None, features: int, axis: str = "embed", *, dtype: DTypeLike) -> RMSNorm:
    """Declares the RMSNorm of a model. Where one is added to the scales, no narrower type than float32 holds the sum."""
    kept = jnp.float32 if config.add_one_to_norms else dtype
    return RMSNorm(layers, features, axis=axis, eps=config.norm_eps, dtype=kept)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023); the cache and what attends over it are the caller's."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike) -> None:
        layers, width = config.num_attending, config.hidden_size
        query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.qkv_bias
        if config.fused_qkv:
            rows = query_rows + 2 * kv_rows
            self.qkv = Linear(layers, rows, width, axes=("qkv", "embed"), bias=bias, dtype=dtype)
        else:
            self.q = Linear(layers, query_rows, width, axes=("heads", "embed"), bias=bias, dtype=dtype)
            self.k = Linear(layers, kv_rows, width, axes=("kv_heads", "embed"), bias=bias, dtype=dtype)
            self.v = Linear(layers, kv_rows, width, axes=("kv_heads", "embed"), bias=bias, dtype=dtype)
        self.o = Linear(
            layers,
            width,
            query_rows,
            axes=("embed", "heads"),
            bias=config.output_bias,
            reduce=config.shards.axes,
            dtype=dtype,
        )
        if config.qk_norm:
            self.q_norm = norm(config, layers, config.head_dim, "head_dim", dtype=dtype)
            self.k_norm = norm(config, layers, config.head_dim, "head_dim", dtype=dtype)
        if config.qk_norm_whole:
            self.q_norm = norm(config, layers, query_rows, "heads", dtype=dtype)
            self.k_norm = norm(config, layers, kv_rows, "kv_heads", dtype=dtype)
        if config.sinks:
            self.sinks = parameter((layers, config.num_heads), ("layers", "heads"), dtype=dtype, std=1.0)
        self.config = config

    def project(self, x: Float[Array, "T E"] | Normed, layer: Layer) -> tuple[Array, Array, Array]:
        """Computes queries [T, Hq, D], keys and values [T, Hkv, D] of this device's heads, before the rotation."""
        group, head_dim = self.config.group_size, self.config.head_dim
        if self.config.fused_qkv:
            # Rows are grouped per KV head, so a shard of heads is a contiguous run of rows.
            fused = rearrange(self.qkv(x, layer), "t (h g d) -> t h g d", g=group + 2, d=head_dim)
            query = rearrange(fused[:, :, :group], "t h g d -> t (h g) d")
            return query, fused[:, :, group], fused[:, :, group + 1]
        projections = (self.q(x, layer), self.k(x, layer), self.v(x, layer))
        query, key, value = (rearrange(each, "t (h d) -> t h d", d=head_dim) for each in projections)
        return query, key, value

    def options(self, layer: Layer) -> dict[str, Any]:
        """Returns what a layer's `attend` is told beside the arrays; a family may override it.

        A model whose layers do not all attend has no windows, so that one number serves both stacks and windows.
        """
        config = self.config
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        found: dict[str, Any] = {"scale": scale, "window": window_of(config.windows, layer)}
        if config.attention_softcap is not None:
            found["softcap"] = config.attention_softcap
        if config.sinks:
            found["sinks"] = pick(self.sinks[...], layer).astype(jnp.float32)
        return found

    def normed(self, query: Array, key: Array, layer: Layer) -> tuple[Array, Array]:
        """Normalises queries and keys, where the model does."""
        if self.config.qk_norm:
            return self.q_norm(query, layer), self.k_norm(key, layer)
        if self.config.qk_norm_whole:
            axes = self.config.shards.axes
            return self.q_norm.over_heads(query, layer, axes), self.k_norm.over_heads(key, layer, axes)
        return query, key

    def __call__(
        self, x: Float[Array, "T E"] | Normed, angles: Angles, cache: Cache, layer: Layer, attend: Attend
    ) -> tuple[Float[Array, "T E"], Cache]:
        own = own_number(self.config, "attention", layer)
        query, key, value = self.project(x, own)
        query, key = self.normed(query, key, own)
        if (turns := angles_of(self.config, angles, layer)) is not None:
            query, key = rotate(query, key, turns)
        out, cache = attend(query, key, value, cache, own, **self.options(own))
        return self.o(rearrange(out, "t h d -> t (h d)"), own), cache


def window_of(windows: tuple[int | None, ...], layer: Layer) -> Array | int | None:
    """Picks a layer's window: a plain number where all layers have the same, so that a scan over layers may ask too."""
    if len(set(windows)) <= 1:
        return windows[0] if windows else None
    return jnp.array([EVERYTHING if each is None else each for each in windows], jnp.int32)[layer]


class GatedMLP(nnx.Module):
    """Gated feed-forward (Shazeer, 2020): down(activation(gate(x)) · up(x)); SwiGLU with "silu"."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, layers: int | None = None) -> None:
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        layers = config.num_layers if layers is None else layers
        self.gate = Linear(layers, inner, width, axes=("mlp", "embed"), bias=bias, dtype=dtype)
        self.up = Linear(layers, inner, width, axes=("mlp", "embed"), bias=bias, dtype=dtype)
        axes = config.shards.axes
        self.down = Linear(layers, width, inner, axes=("embed", "mlp"), bias=bias, reduce=axes, dtype=dtype)
        self.config = config

    def __call__(self, x: Float[Array, "T E"] | Normed, layer: Layer) -> Float[Array, "T E"]:
        gate, up = self.gate(x, layer), self.up(x, layer)
        if self.config.activation == "silu":  # which a matrix may compute while it reads its input
            return self.down(up, layer, gate=gate)
        return self.down(gated(self.config, gate, up), layer)


class DecoderLayers(nnx.Module):
    """All layers at once: every weight is stacked, `__call__` computes the one that `layer` names.

    Norms and MLPs are stacked over all layers, what mixes tokens over the layers of its kind.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike) -> None:
        layers, width = config.num_layers, config.hidden_size
        if config.norms != "after":
            self.attn_norm = norm(config, layers, width, dtype=dtype)
            self.mlp_norm = norm(config, layers, width, dtype=dtype)
        if config.norms != "before":
            self.attn_out_norm = norm(config, layers, width, dtype=dtype)
            self.mlp_out_norm = norm(config, layers, width, dtype=dtype)
        if config.num_attending:
            self.attn = Attention(config, dtype=dtype)
        if config.layers_of("conv"):
            self.conv = ShortConv(config, dtype=dtype)
        self.mlp = (GatedMLP if config.moe is None else ExpertsMLP)(config, dtype=dtype)
        if config.dense_first:
            self.dense_mlp = GatedMLP(config, dtype=dtype, layers=config.dense_first)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "T E"],
        angles: Angles,
        cache: Cache,
        layer: Layer,
        attend: Attend,
        dense: bool = False,
        mixer: str = "attention",
    ) -> tuple[Float[Array, "T E"], Cache]:
        """Computes one layer; `dense` and `mixer` say of which kind it is, see `LayerKind`."""
        before, after = self.config.norms != "after", self.config.norms != "before"
        with jax.named_scope(mixer):
            normed = self.attn_norm.later(x, layer) if before else x
            if mixer == "conv":
                if not isinstance(attend, Convolve):
                    raise TypeError("the model has short convolutions: what it attends with must have a causal_conv")
                out, cache = self.conv(normed, cache, own_number(self.config, mixer, layer), attend)
            else:
                out, cache = self.attn(normed, angles, cache, layer, attend)
            x = self._sum(x, self.attn_out_norm(out, layer) if after else out)
        with jax.named_scope("mlp"):
            normed = self.mlp_norm.later(x, layer) if before else x
            out = self.dense_mlp(normed, layer) if dense else self.mlp(normed, layer - self.config.dense_first)
            return self._sum(x, self.mlp_out_norm(out, layer) if after else out), cache

    def _sum(self, x: Float[Array, "T E"], out: Float[Array, "T E"]) -> Float[Array, "T E"]:
        scale = self.config.residual_scale
        return x + (out if scale == 1.0 else out * jnp.asarray(scale, out.dtype))


class Decoder(nnx.Module):
    """A decoder-only transformer as a function of its parameters.

    `split_model` gives the definition and the parameters apart; `merge_model` puts them together inside a traced
    function. A family that begins or ends differently overrides `embed_tokens`, `angles` or `logits`.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, shards=config.shards, dtype=dtype)
        self.layers = DecoderLayers(config, dtype=dtype)
        self.final_norm = norm(config, None, config.hidden_size, dtype=dtype)
        if not config.tie_word_embeddings:
            self.head = Embedding(config.vocab_size, config.hidden_size, shards=config.shards, dtype=dtype)

    def embed_tokens(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T E"]:
        """Computes the input of the first layer."""
        x, scale = self.embed(token_ids), self.config.embedding_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def angles(self, positions: Int[Array, " T"]) -> Angles:
        """Computes what the layers need to know of the positions, once for all layers."""
        return rope_angles(self.config, positions)

    def __call__(
        self,
        token_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        cache: Cache,
        attend: Attend,
        *,
        loop: LayerLoop = 1,
    ) -> tuple[Float[Array, "T E"], Cache]:
        """Computes the hidden state of every token after the last layer (before the final norm), and the cache."""
        x = self.embed_tokens(token_ids, positions)
        angles = self.angles(positions)

        def in_turn(run: Run, carry: tuple[Array, Cache], first: Layer | int) -> tuple[tuple[Array, Cache], None]:
            for offset, kind in enumerate(run.kinds):
                layer = first + offset if offset else first
                layer = jnp.int32(layer) if isinstance(layer, int) else layer
                carry = self.layers(carry[0], angles, carry[1], layer, attend, **kind.options)
            return carry, None

        for run in layer_runs(self.config):
            if loop == "unroll":
                for first in run.firsts:
                    (x, cache), _ = in_turn(run, (x, cache), first)
            else:
                firsts, unroll = jnp.array(run.firsts, jnp.int32), max(1, loop // run.period)
                (x, cache), _ = lax.scan(partial(in_turn, run), (x, cache), firsts, unroll=unroll)
        return x, cache

    def normed(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """Computes hidden states after the final norm: what the head reads, and what embeddings are made of."""
        return self.final_norm(x)

    def logits(self, x: Float[Array, "S E"]) -> Float[Array, "S V"]:
        """Scores of every token of the vocabulary, float32."""
        with jax.named_scope("head"):
            head = self.embed if self.config.tie_word_embeddings else self.head
            logits, scale = head.logits(self.normed(x)), self.config.logit_scale
            return softcap(logits if scale == 1.0 else logits * scale, self.config.logit_softcap)
