"""The architecture of a decoder as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llm_infer.base.errors import ModelError, UserError
from llm_infer.parallel.axes import OWN_NAMES, AxisNames


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al., RoFormer, 2021) and how its frequencies are scaled.

    Attributes:
        theta: base of the frequencies.
        factor: by which low frequencies are divided, or all of them with "linear" (1 = no scaling).
        low_freq_factor, high_freq_factor: of "llama3": where the scaling sets in (Llama 3.1 release notes).
        original_max_position: context that the model was trained with before the scaling.
        kind: "llama3", "linear", "yarn" or "longrope".
        fraction: of each head's elements that are rotated, the first ones.
        beta_fast, beta_slow: of "yarn": rotations within the original context from which a frequency stays, and up to
            which it is divided by `factor` (Peng et al., 2023, section 3.2).
        truncate: of "yarn": the bounds between them are rounded to whole elements.
        amplitude: by which cosine and sine are multiplied.
        short_factors, long_factors: of "longrope": by which each frequency is divided in engines whose sequences stay within
            `original_max_position`, and in others (Ding et al., 2024).
        long: which of the two are taken.
        query_beta: by 1 + query_beta · log(1 + ⌊position / original_max_position⌋) queries are multiplied (Meta, Llama 4, 2025).
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    kind: str = "llama3"
    fraction: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long: bool = True
    query_beta: float = 0.0

    def rotated(self, head_dim: int) -> int:
        """Returns how many elements of a head are rotated."""
        return int(head_dim * self.fraction)

    def check(self, head_dim: int) -> None:
        """Raises ModelError for heads that cannot be rotated so."""
        if not 0 < self.fraction <= 1:
            raise ModelError(f"rotary embedding of {self.fraction} of each head, expected a fraction up to 1")
        rotated = self.rotated(head_dim)
        if rotated % 2 or not 0 < rotated <= head_dim:
            raise ModelError(
                f"head_dim={head_dim}: rotary embedding of {rotated} elements of each head needs an even number "
                f"from 2 to {head_dim}"
            )
        if self.kind == "longrope" and 2 * len(self.long_factors) != rotated:
            raise ModelError(f"{len(self.long_factors)} factors of the rotation for {rotated // 2} frequencies")


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts in place of each layer's MLP (Shazeer et al., 2017); every token takes the K best of X experts.

    Attributes:
        num_experts, experts_per_token, intermediate_size: X, K, and F of one expert.
        norm_topk_prob: the K weights of a token are divided by their sum.
        norm_epsilon: added to that sum.
        router_bias, expert_biases: the router, and the experts' matrices, have biases.
        shared_size: F of the expert that every token runs through beside its own; 0 for none.
        shared_gate: what that expert computes is multiplied by the sigmoid of a number for each token.
        scores: of the experts: "softmax" over all, or "sigmoid" of each alone.
        correction: a number for each expert is added to its score when the K best are chosen, and not to its weight (Wang et al.,
            "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024).
        groups, top_groups: experts are chosen in those of so many equal groups whose two best scores have the largest sums
            (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024).
        scale: of the K weights, at the end.
        dense_first: layers before the first with experts; they have a dense MLP.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool = True
    router_bias: bool = False
    expert_biases: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    scores: str = "softmax"
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    dense_first: int = 0
    norm_epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.num_experts > 1 << 16:  # lists are made that long
            raise ModelError(f"num_experts={self.num_experts}, expected at most {1 << 16}")
        if self.scores not in ("softmax", "sigmoid"):
            raise ModelError(f"scores of experts by {self.scores!r:.60}, expected softmax or sigmoid")
        if self.experts_per_token > self.num_experts:
            raise ModelError(
                f"num_experts_per_tok={self.experts_per_token} is more than num_experts={self.num_experts} (num_local_experts or "
                "n_routed_experts in some configs)"
            )
        of_one, rest = divmod(self.num_experts, self.groups)
        if rest or not 1 <= self.top_groups <= self.groups or (self.groups > 1 and of_one < 2):
            raise ModelError(
                f"n_group={self.groups}, topk_group={self.top_groups}: expected a part of the groups, and the {self.num_experts} "
                "experts to divide into groups of two or more"
            )
        if self.experts_per_token > of_one * self.top_groups:
            raise ModelError(
                f"num_experts_per_tok={self.experts_per_token} is more than topk_group={self.top_groups} groups of {of_one} have"
            )


@dataclass(frozen=True, slots=True)
class Shards:
    """Over how many devices one copy of a model is cut (see `models.sharded`).

    Attributes:
        tp, ep: sizes of those mesh axes. Dense layers are cut over both; experts over `ep`, and each of them over `tp`.
        kv_copies: devices that hold the same KV head, where there are more devices than KV heads.
        names: how the mesh calls its axes.
    """

    tp: int = 1
    ep: int = 1
    kv_copies: int = 1
    names: AxisNames = OWN_NAMES

    @property
    def devices(self) -> int:
        """Devices that hold one copy of the model."""
        return self.tp * self.ep

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes of more than one device over which layers are cut."""
        return self.names.of(role for role, size in (("tp", self.tp), ("ep", self.ep)) if size > 1)

    def padded(self, rows: int) -> int:
        """Returns `rows` rounded up, so that every device has the same number."""
        return -(-rows // self.devices) * self.devices


UNCUT = Shards()

LAYER_KINDS = ("attention", "conv")
"""What mixes the tokens of a layer: attention over pages, or a short convolution whose last inputs are its state."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer.

    Attributes:
        architecture: name of the Hugging Face class, e.g. "LlamaForCausalLM": the row of the registry.
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: V E L Hq Hkv D F.
        max_position_embeddings: context length in tokens.
        norm_eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
        rope: rotary positions; None for models that learn their positions.
        layer_ropes: rotary positions of each layer, None for layers without; empty where all layers have `rope`.
        tie_word_embeddings: the output head is the embedding matrix.
        qkv_bias: the query, key and value projections have biases.
        output_bias: the output projection of attention has one.
        mlp_bias: the matrices of the MLP have biases.
        qk_norm: queries and keys are RMS-normalised per head before the rotation.
        qk_norm_whole: they are normalised over all heads together instead.
        norms: where a layer's norms are: "before" attention and MLP, "after" them, before the sum, or "both".
        add_one_to_norms: the file holds the norms' scales less one; the parameters are float32.
        activation: of the MLP, between two matrices and a third: a key of `layers.ACTIVATIONS`.
        swiglu_limit, swiglu_slope: of the activation "clamped", see `layers.clamped`.
        sinks: attention has a learned score per head that takes part in the softmax without a value.
        embedding_scale: by which embeddings are multiplied before the first layer.
        residual_scale: by which the results of attention and MLP are multiplied before they are added.
        attention_scale: of the scores; None for head_dim ** -0.5.
        attention_softcap: c in c · tanh(score / c); None for none.
        logit_scale: by which logits are multiplied.
        logit_softcap: c in c · tanh(logit / c); None for none.
        windows: tokens that the rows of each layer see, themselves included; None for all. Empty where all layers see all.
        kinds: of each layer, what mixes its tokens: one of LAYER_KINDS. Empty where all layers attend.
        conv_taps: tokens that a layer of kind "conv" sees, the own one included.
        conv_bias: its matrices and its taps have biases.
        moe: experts in place of the MLP; `intermediate_size` is then not used.
        fused_qkv: query, key and value projections are one matrix, rows grouped per KV head [q…q|k|v].
        shards: how the model is cut over devices; `num_kv_heads` then counts every copy of a KV head.
        own: the functions of a model that a user has written (`models.own.OwnFamily`).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    rope: RopeConfig | None = RopeConfig()
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    norms: str = "before"
    add_one_to_norms: bool = False
    activation: str = "silu"
    swiglu_limit: float = 7.0
    swiglu_slope: float = 1.702
    sinks: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    kinds: tuple[str, ...] = ()
    conv_taps: int = 0
    conv_bias: bool = False
    moe: MoEConfig | None = None
    fused_qkv: bool = True
    shards: Shards = UNCUT
    own: Any = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        for rope in (self.rope, *self.layer_ropes):
            if rope is not None:
                rope.check(self.head_dim)
        if len({rope.rotated(self.head_dim) for rope in self.layer_ropes if rope is not None}) > 1:
            raise ModelError("all layers with rotary positions must rotate as many elements of a head")
        if self.dense_first > self.num_layers:
            raise ModelError(
                f"first_k_dense_replace={self.dense_first} is more than num_hidden_layers={self.num_layers} "
                "(num_dense_layers in some configs)"
            )
        if len(self.layer_ropes) not in (0, self.num_layers):
            raise ModelError(f"layer_ropes has {len(self.layer_ropes)} entries for {self.num_layers} layers")
        if self.kinds and (len(self.kinds) != self.num_layers or not set(self.kinds) <= set(LAYER_KINDS)):
            raise ModelError(
                f"layer_types={self.kinds}: expected one of {', '.join(LAYER_KINDS)} for each of the {self.num_layers} layers"
            )
        if "conv" in self.kinds and self.conv_taps < 2:
            raise ModelError(f"conv_L_cache={self.conv_taps}: expected at least 2")
        if "conv" in self.kinds and any(window is not None for window in self.windows):
            raise ModelError("sliding windows beside layers with convolutions are not supported")
        if self.windows and (
            len(self.windows) != self.num_layers or any(w is not None and w < 1 for w in self.windows)
        ):
            raise ModelError(
                f"windows={self.windows}: expected one for each of the {self.num_layers} layers, at least 1 token or None"
            )

    def for_length(self, max_model_len: int | None) -> ModelConfig:
        """Returns the configuration for sequences up to this length; None for all that the model can have."""
        length = self.max_position_embeddings if max_model_len is None else max_model_len

        def chosen(rope: RopeConfig | None) -> RopeConfig | None:
            if rope is None or rope.kind != "longrope":
                return rope
            return replace(rope, long=length > rope.original_max_position)

        return replace(self, rope=chosen(self.rope), layer_ropes=tuple(map(chosen, self.layer_ropes)))

    def with_layers(self, number: int) -> ModelConfig:
        """Returns the configuration of the first layers alone."""
        moe = self.moe and replace(self.moe, dense_first=min(self.moe.dense_first, number))
        own = {name: getattr(self, name)[:number] for name in ("windows", "layer_ropes", "kinds")}
        return replace(self, num_layers=number, moe=moe, **own)

    @property
    def dense_first(self) -> int:
        """Layers with a dense MLP before the first with experts; 0 for models without experts, which have but one kind."""
        return 0 if self.moe is None else self.moe.dense_first

    @property
    def mixers(self) -> tuple[str, ...]:
        """What mixes the tokens of each layer: one of LAYER_KINDS."""
        return self.kinds or ("attention",) * self.num_layers

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Returns the layers of one of LAYER_KINDS."""
        return tuple(layer for layer, each in enumerate(self.mixers) if each == kind)

    @property
    def num_attending(self) -> int:
        """Layers that attend, and so have keys and values."""
        return self.mixers.count("attention")

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state of fixed size for each sequence."""
        return self.num_attending < self.num_layers

    def state_bytes(self, itemsize: int = 2) -> int:
        """Counts the bytes of the states of one sequence: of each convolution the inputs that the next token sees."""
        return len(self.layers_of("conv")) * (self.conv_taps - 1) * self.hidden_size * itemsize

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_heads // self.num_kv_heads

    def check_context(self, max_model_len: int | None) -> None:
        """Raises UserError for sequences longer than the model's positions."""
        if max_model_len is not None and max_model_len > self.max_position_embeddings:
            raise UserError(
                f"max_model_len={max_model_len} is above the model's context of {self.max_position_embeddings} tokens: "
                "lower max_model_len"
            )

    def kv_bytes_per_token(self, itemsize: int = 4) -> int:
        """Counts the bytes of K and V of one token over all layers."""
        return 2 * self.num_attending * self.num_kv_heads * self.head_dim * itemsize

    def kv_bytes(self, length: int, itemsize: int = 2) -> int:
        """Counts the bytes of K and V of what the layers see of a sequence of so many tokens."""
        attending = self.layers_of("attention")
        windows = [self.windows[layer] if self.windows else None for layer in attending]
        seen = sum(length if window is None else min(length, window) for window in windows)
        return seen * self.kv_bytes_per_token(itemsize) // len(attending)
