"""The architecture of a decoder as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from llm_infer.base.errors import ModelError, UserError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al., RoFormer, 2021) with the frequency scaling of Llama 3.1.

    Attributes:
        theta: base of the frequencies.
        factor: Llama 3 scaling: low frequencies are divided by it (1 = no scaling).
        low_freq_factor, high_freq_factor, original_max_position: where the scaling sets in (Llama 3.1 release notes).
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts in place of each layer's MLP (Shazeer et al., 2017); every token takes the K best of X experts.

    Attributes:
        num_experts, experts_per_token, intermediate_size: X, K, and F of one expert.
        norm_topk_prob: the K weights of a token are divided by their sum.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ModelError(
                f"num_experts_per_tok={self.experts_per_token} is more than num_experts={self.num_experts}"
            )


@dataclass(frozen=True, slots=True)
class Shards:
    """Over how many devices one copy of a model is cut (see `models.sharded`).

    Attributes:
        tp, ep: sizes of those mesh axes. Dense layers are cut over both; experts over `ep`, and each of them over `tp`.
        kv_copies: devices that hold the same KV head, where there are more devices than KV heads.
    """

    tp: int = 1
    ep: int = 1
    kv_copies: int = 1

    @property
    def devices(self) -> int:
        """Devices that hold one copy of the model."""
        return self.tp * self.ep

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes of more than one device over which layers are cut."""
        return tuple(name for name, size in (("tp", self.tp), ("ep", self.ep)) if size > 1)

    def padded(self, rows: int) -> int:
        """Returns `rows` rounded up, so that every device has the same number."""
        return -(-rows // self.devices) * self.devices


UNCUT = Shards()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer.

    Attributes:
        architecture: name of the Hugging Face class, e.g. "LlamaForCausalLM": the row of the registry.
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: V E L Hq Hkv D F.
        max_position_embeddings: context length in tokens.
        norm_eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
        rope: rotary positions; None for models that learn their positions.
        tie_word_embeddings: the output head is the embedding matrix.
        qkv_bias: the query, key and value projections have biases.
        qk_norm: queries and keys are RMS-normalised per head before the rotation.
        windows: tokens that the rows of each layer see, themselves included; None for all. Empty where all layers see all.
        moe: experts in place of the MLP; `intermediate_size` is then not used.
        fused_qkv: query, key and value projections are one matrix, rows grouped per KV head [q…q|k|v].
        shards: how the model is cut over devices; `num_kv_heads` then counts every copy of a KV head.
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
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    moe: MoEConfig | None = None
    fused_qkv: bool = True
    shards: Shards = UNCUT

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2 and self.rope is not None:
            raise ModelError(f"head_dim={self.head_dim} is odd: rotary embedding needs an even head size")
        if self.windows and (
            len(self.windows) != self.num_layers or any(w is not None and w < 1 for w in self.windows)
        ):
            raise ModelError(
                f"windows={self.windows}: expected one for each of the {self.num_layers} layers, at least 1 token or None"
            )

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
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
