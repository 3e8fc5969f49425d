"""Mixture of experts: the router, and an MLP in which every token runs through the few experts that it is routed to."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.layers import Layer, Linear, Normed, gated, linear, parameter, pick, place
from llm_infer.parallel.collectives import first_of_part, sum_over
from llm_infer.quant import StoredWeights
from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.row_sums import row_sums, softmax

SCORES = {"softmax": softmax, "sigmoid": jax.nn.sigmoid}


def route(
    logits: Float[Array, "T X"], config: MoEConfig, correction: Float[Array, " X"] | None = None
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Picks weights (float32) and numbers of each token's experts: those with the K largest scores, corrected where there is
    a correction; the weights are the scores."""
    scores = SCORES[config.scores](logits.astype(jnp.float32))
    if correction is None and config.groups == 1:
        weights, experts = lax.top_k(scores, config.experts_per_token)
    else:
        ranked = scores if correction is None else scores + correction.astype(jnp.float32)[None]
        _, experts = lax.top_k(_in_best_groups(ranked, config), config.experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        total = row_sums(weights)[:, None]
        weights = weights / (total + config.norm_epsilon if config.norm_epsilon else total)
    return weights * config.scale if config.scale != 1.0 else weights, experts


def _in_best_groups(scores: Float[Array, "T X"], config: MoEConfig) -> Float[Array, "T X"]:
    """Leaves the scores of experts in the best groups, and puts those of others below all."""
    if config.top_groups == config.groups:
        return scores
    grouped = scores.reshape(scores.shape[0], config.groups, -1)
    best_two, _ = lax.top_k(grouped, 2)
    _, best = lax.top_k(best_two[..., 0] + best_two[..., 1], config.top_groups)
    kept = jnp.any(best[:, :, None] == jnp.arange(config.groups)[None, None], axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(scores.shape)


def block_rows(assignments: int, num_experts: int) -> int:
    """Chooses the rows of a block of work for `assignments` (token, expert) pairs: an expert's share, from 4 to 64.

    A block reads its expert's weights once whatever its rows; the last block of each expert is filled up with padding.
    """
    share = -(-assignments // num_experts)
    return int(np.clip(1 << (share - 1).bit_length(), 4, 64))


class ExpertsMLP(nnx.Module):
    """Gated experts behind a router, and maybe one for all tokens; only experts that some token chose are read.

    The (token, expert) pairs are sorted by expert. A kernel multiplies all of them where there is one; else they are cut into
    blocks of rows of one expert each, and a loop with a dynamic trip count goes over the blocks that exist. Nothing the size
    of tokens × experts × F is ever made.

    A loop with a dynamic trip count has no gradient: `counted` has it go over as many blocks as there can be.

    Over a mesh every device routes all tokens, computes the pairs of its own experts, and the results are summed.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike) -> None:
        assert config.moe is not None
        layers, width, moe = config.num_layers - config.dense_first, config.hidden_size, config.moe
        experts, inner, bias = moe.num_experts, moe.intermediate_size, moe.expert_biases
        self.router = Linear(layers, experts, width, axes=("router", "embed"), bias=moe.router_bias, dtype=dtype)
        # The experts' matrices lie below each other, so that every weight is 2-D per layer: rows x·F … (x+1)·F.
        self.gate = Linear(layers, experts * inner, width, axes=("expert_rows", "embed"), bias=bias, dtype=dtype)
        self.up = Linear(layers, experts * inner, width, axes=("expert_rows", "embed"), bias=bias, dtype=dtype)
        self.down = Linear(layers, experts * width, inner, axes=("experts", "expert_mlp"), bias=bias, dtype=dtype)
        if moe.shared_size:
            inner = moe.shared_size
            self.shared_gate = Linear(layers, inner, width, axes=("mlp", "embed"), dtype=dtype)
            self.shared_up = Linear(layers, inner, width, axes=("mlp", "embed"), dtype=dtype)
            self.shared_down = Linear(layers, width, inner, axes=("embed", "mlp"), dtype=dtype)
        if moe.correction:
            self.correction = parameter((layers, experts), ("layers", "router"), dtype=jnp.float32, std=0.1)
        if moe.shared_gate:
            self.shared_weight = Linear(layers, 1, width, axes=("router", "embed"), dtype=dtype)
        self.model, self.config, self.shards = config, moe, config.shards
        self.counted = False

    def __call__(self, x: Float[Array, "T E"] | Normed, layer: Layer) -> Float[Array, "T E"]:
        x = x.array() if isinstance(x, Normed) else x
        moe = self.config
        correction = pick(self.correction[...], layer) if moe.correction else None
        weights, experts = route(self.router(x, layer), moe, correction)
        here, num_here = None, moe.num_experts // self.shards.ep
        if self.shards.ep > 1:
            experts = experts - first_of_part(num_here, self.shards.names.ep)
            here = (experts >= 0) & (experts < num_here)
            weights, experts = jnp.where(here, weights, 0), jnp.where(here, experts, num_here)
        products = self._grouped if self._has_grouped_kernel(x, experts.size, num_here) else self._in_blocks
        chosen = products(x, layer, experts, num_here).astype(jnp.float32)
        if (bias := self.down.bias) is not None:
            chosen = chosen + self._down_biases(pick(bias[...], layer), experts, here)
        total = _weighted(chosen, weights).astype(x.dtype)
        if moe.shared_size:
            total = total + self._shared(x, layer)
        return sum_over(total, self.shards.axes)

    def _has_grouped_kernel(self, x: Float[Array, "T E"], pairs: int, num_experts: int) -> bool:
        """Tells whether a kernel multiplies all experts' rows at once, reading matrices where they lie in their stack.

        XLA's own ragged product copies each layer's matrices out of the stack on TPUs and multiplies with all experts on CPUs
        and GPUs. The loop over blocks is the better choice there, but on a GPU it takes a launch or more for each product.
        """
        weight = self.gate.weight.get_value()
        if isinstance(weight, StoredWeights):
            return False
        rows, sizes = (
            jax.ShapeDtypeStruct((pairs, x.shape[1]), x.dtype),
            jax.ShapeDtypeStruct((num_experts,), jnp.int32),
        )
        case = case_of({"x": rows, "weights": weight, "group_sizes": sizes})
        return dispatch.choose("grouped_matmul", case).name == "gpu_triton"

    def _grouped(
        self, x: Float[Array, "T E"], layer: Layer, experts: Int[Array, "T K"], num_experts: int
    ) -> Float[Array, "T K E"]:
        """Multiplies the rows of all experts by one kernel per matrix, without the last bias."""
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        expert = flat[order]
        sizes = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")
        rows = x[order // self.config.experts_per_token]

        def product(matrices: Linear, inputs: Float[Array, "A I"]) -> Float[Array, "A O"]:
            weights = matrices.weight[...]
            return grouped_matmul(inputs, weights, sizes, place(weights.shape[0], layer))

        def biased(matrices: Linear) -> Float[Array, "A O"]:
            out = product(matrices, rows)
            if matrices.bias is None:
                return out
            return out + pick(matrices.bias[...], layer).reshape(num_experts, -1).at[expert].get(mode="clip")

        out = product(self.down, gated(self.model, biased(self.gate), biased(self.up)))
        back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
        return out[back].reshape(*experts.shape, -1)

    def _in_blocks(
        self, x: Float[Array, "T E"], layer: Layer, experts: Int[Array, "T K"], num_experts: int
    ) -> Float[Array, "T K E"]:
        """Loops over blocks of rows of one expert, without the last bias."""
        width, rows = x.shape[1], block_rows(experts.size, self.config.num_experts)
        # Each expert that is used adds less than one block of padding.
        max_blocks = min(experts.size, -(-experts.size // rows) + num_experts)
        flat = experts.reshape(-1)
        places, expert_of_block, num_blocks = _blocks(flat, num_experts, rows, max_blocks)
        if self.shards.ep > 1:  # other devices' pairs go behind the last block, where nothing is kept
            places = jnp.where(flat < num_experts, places, max_blocks * rows)
        token = jnp.arange(experts.size, dtype=jnp.int32) // self.config.experts_per_token
        # Padding rows read token 0; nobody reads what becomes of them.
        source = jnp.zeros(max_blocks * rows, jnp.int32).at[places].set(token)

        def expert_rows(matrices: Linear, inputs: Float[Array, "R I"], expert: Int[Array, ""]) -> Float[Array, "R O"]:
            return linear(inputs, matrices.weight.get_value(), layer, (num_experts, expert))

        def biased(matrices: Linear, out: Float[Array, "R O"], expert: Int[Array, ""]) -> Float[Array, "R O"]:
            if matrices.bias is None:
                return out
            each, size = matrices.bias[...], out.shape[1]
            return out + lax.dynamic_slice(each, (place(each.shape[0], layer), expert * size), (1, size))

        def block(index: Int[Array, ""]) -> Float[Array, "R E"]:
            expert = expert_of_block[index]
            inputs = x[lax.dynamic_slice(source, (index * rows,), (rows,))]
            gate, up = (biased(m, expert_rows(m, inputs, expert), expert) for m in (self.gate, self.up))
            return expert_rows(self.down, gated(self.model, gate, up), expert)

        def keep(index: Int[Array, ""], out: Float[Array, "N E"]) -> Float[Array, "N E"]:
            return lax.dynamic_update_slice(out, block(index), (index * rows, jnp.int32(0)))

        if self.counted:
            out = lax.map(block, jnp.arange(max_blocks, dtype=jnp.int32)).reshape(-1, width)
        else:
            out = lax.fori_loop(0, num_blocks, keep, jnp.zeros((max_blocks * rows, width), x.dtype))
        return out[places].reshape(*experts.shape, width)

    def _down_biases(
        self, bias: Float[Array, " R"], experts: Int[Array, "T K"], here: Array | None
    ) -> Float[Array, "T K E"]:
        """Picks each pair's bias of the last matrix; of devices that share an expert, the first adds it."""
        found = bias.reshape(-1, self.model.hidden_size).astype(jnp.float32)[experts]
        if here is not None:
            found = jnp.where(here[:, :, None], found, 0)
        return jnp.where(lax.axis_index(self.shards.names.tp) == 0, found, 0) if self.shards.tp > 1 else found

    def _shared(self, x: Float[Array, "T E"], layer: Layer) -> Float[Array, "T E"]:
        """Computes this device's part of the expert that all tokens run through."""
        gate, up = self.shared_gate(x, layer), self.shared_up(x, layer)
        out = self.shared_down(gated(self.model, gate, up), layer)
        if not self.config.shared_gate:
            return out
        return out * jax.nn.sigmoid(self.shared_weight(x, layer).astype(jnp.float32)).astype(out.dtype)


def _weighted(chosen: Float[Array, "T K E"], weights: Float[Array, "T K"]) -> Float[Array, "T E"]:
    """Adds up each token's experts in their order; a reduction would have an order that XLA chooses."""
    terms = [chosen[:, k] * weights[:, k, None] for k in range(weights.shape[1])]
    return functools.reduce(jnp.add, terms)


def _blocks(
    experts: Int[Array, " A"], num_experts: int, rows: int, max_blocks: int
) -> tuple[Int[Array, " A"], Int[Array, " B"], Int[Array, ""]]:
    """Says where each of the A pairs goes (block · rows + row), the expert of each block, and how many blocks there are.

    Pairs of an expert `num_experts` (one of another device) have no place.
    """
    counts = jnp.zeros(num_experts, jnp.int32).at[experts].add(1)
    ends = jnp.cumsum((counts + rows - 1) // rows)  # blocks up to and including each expert
    first_row = (ends - (counts + rows - 1) // rows) * rows
    order = jnp.argsort(experts, stable=True)
    rank = jnp.arange(experts.size, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[experts[order]]
    places = jnp.zeros_like(experts).at[order].set(first_row[experts[order]] + rank)
    expert_of_block = jnp.searchsorted(ends, jnp.arange(max_blocks, dtype=jnp.int32), side="right")
    # Where all blocks that there can be are computed, those past the last are somebody's.
    return places, jnp.minimum(expert_of_block.astype(jnp.int32), num_experts - 1), ends[-1]
