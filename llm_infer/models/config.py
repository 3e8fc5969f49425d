"""The architecture of a decoder as plain numbers, and the reader that turns a Hugging Face config into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_infer.errors import ModelError, UserError
from llm_infer.models.config_keys import is_neutral, same

LARGEST = 2**31 - 1
"""Largest size or position: programs count in int32."""
LARGEST_THETA = 1e15
"""Published bases of rotary frequencies end at 5e10."""


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
        """`rows` rounded up, so that every device has the same number."""
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

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Number of weights in closed form; equals what a loaded model holds (tests/models/test_configs.py)."""
        width, head_dim = self.hidden_size, self.head_dim
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        attention = qkv_rows * width + self.num_heads * head_dim * width
        attention += qkv_rows * self.qkv_bias + 2 * head_dim * self.qk_norm
        if self.moe is None:
            mlp = 3 * self.intermediate_size * width
        else:
            mlp = self.moe.num_experts * (3 * self.moe.intermediate_size * width + width)
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + mlp + 2 * width) + width

    def check_context(self, max_model_len: int | None) -> None:
        """Raises UserError for sequences longer than the model's positions."""
        if max_model_len is not None and max_model_len > self.max_position_embeddings:
            raise UserError(
                f"max_model_len={max_model_len} is above the model's context of {self.max_position_embeddings} tokens: "
                "lower max_model_len"
            )

    def kv_bytes_per_token(self, itemsize: int = 4) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


class ConfigReader:
    """Reads a Hugging Face config.json so that no key is passed over in silence.

    Every key is taken, or at a value that changes nothing (see `config_keys`), or an error at `finish`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = ...) -> Any:
        """Value of `key`; without a default a missing key is an error."""
        self._taken.add(key)
        if key in self._values and self._values[key] is not None:
            return self._values[key]
        if default is ...:
            raise ModelError(f"config.json has no {key!r}, which this architecture needs")
        return default

    def integer(self, key: str, default: Any = ...) -> int:
        """A positive whole number."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise ModelError(f"config.json: {key}={value!r:.60}, expected a positive whole number up to {LARGEST}")
        return value

    def number(self, key: str, default: Any = ..., *, high: float = math.inf) -> float:
        """A finite positive number, at most `high`."""
        return positive(key, self.take(key, default), high)

    def expect(self, key: str, *allowed: Any) -> None:
        """The key, if present, must have one of these values: others change the computation in a way not built here."""
        value = self.take(key, allowed[0])
        if not any(same(value, each) for each in allowed):
            raise ModelError(f"config.json: {key}={value!r:.60} is not supported, expected one of {list(allowed)}")

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {key}={value!r}, expected true or false")
        return value

    def full_attention(self) -> None:
        """Sliding windows must be off, in the older and the newer way to say so."""
        if self.flag("use_sliding_window", False):
            raise ModelError("config.json: use_sliding_window=true is not supported, expected false")
        # Without the switch these two have no effect.
        self._taken.update(("sliding_window", "max_window_layers"))

    def same_layers(self) -> None:
        """All layers must attend to the whole context."""
        kinds = self.take("layer_types", [])
        if not isinstance(kinds, list):
            raise ModelError(f"config.json: layer_types={kinds!r:.60}, expected a list")
        for kind in kinds:
            if kind != "full_attention":
                raise ModelError(f"config.json: layer_types has {kind!r:.60}, which is not supported")

    def rope(self) -> RopeConfig:
        """`rope_theta` with `rope_scaling`, or the newer `rope_parameters` that holds both."""
        name = "rope_parameters" if self.take("rope_parameters", None) else "rope_scaling"
        scaling = self.take(name, {})
        if not isinstance(scaling, dict):
            raise ModelError(f"config.json: {name}={scaling!r:.60}, expected an object or null")
        # A null says that a key is not set.
        scaling = {key: value for key, value in scaling.items() if value is not None}
        theta = positive("rope_theta", scaling.pop("rope_theta", self.take("rope_theta", 10000.0)), LARGEST_THETA, 1.0)
        older = scaling.pop("type", "default")
        kind = scaling.pop("rope_type", older)
        if not same(scaling.pop("partial_rotary_factor", 1.0), 1.0):
            raise ModelError("config.json: a partial_rotary_factor other than 1 is not supported")
        if kind != "llama3":
            return self._unscaled(theta, kind, scaling)
        numbers = {}
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if key not in scaling:
                raise ModelError(f"config.json: rope scaling 'llama3' has no {key!r}")
            numbers[key] = positive(f"{name}[{key!r}]", scaling.pop(key), float(LARGEST))
        if scaling:
            raise ModelError(f"config.json: unknown keys in the rope scaling: {sorted(scaling)}")
        factor, low, high, original = numbers.values()
        if high <= low or factor < 1 or original != int(original):
            raise ModelError(
                f"config.json: rope scaling 'llama3' has factor={factor:g}, low_freq_factor={low:g}, "
                f"high_freq_factor={high:g}, original_max_position_embeddings={original:g}: expected a factor of at least "
                "1, a high one above the low one, and a whole number of positions"
            )
        return RopeConfig(theta, factor, low, high, int(original))

    def _unscaled(self, theta: float, kind: object, scaling: dict[str, Any]) -> RopeConfig:
        """Frequencies as they are: no scaling, or one by the factor 1."""
        neutral = {"factor": 1.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        # Where the scaling would set in, which means nothing without one.
        where = {"original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "finetuned"}
        known = kind == "default" or (kind in ("linear", "dynamic", "yarn") and "factor" in scaling)
        if not known or not all(
            key in where or (key in neutral and same(value, neutral[key])) for key, value in scaling.items()
        ):
            raise ModelError(
                f"config.json: rope scaling {kind!r:.60} with {scaling!r:.120} is not supported, expected 'default', "
                "'llama3', or a factor of 1"
            )
        return RopeConfig(theta)

    def llama_like(self) -> dict[str, Any]:
        """The fields of `ModelConfig` that all Llama-like configs spell the same way."""
        heads, width = self.integer("num_attention_heads"), self.integer("hidden_size")
        self.expect("hidden_act", "silu")
        self.expect("attention_bias", False)
        self.same_layers()
        return {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": width,
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", max(1, width // heads)),
            "intermediate_size": self.integer("intermediate_size"),
            "max_position_embeddings": self.integer("max_position_embeddings"),
            "norm_eps": self.number("rms_norm_eps", 1e-6, high=1.0),
            "rope": self.rope(),
            "tie_word_embeddings": self.flag("tie_word_embeddings", False),
        }

    def finish(self) -> None:
        """Raise for every key that was neither taken nor is known to be harmless."""
        left = {key: value for key, value in self._values.items() if key not in self._taken}
        unknown = sorted(key for key, value in left.items() if not is_neutral(key, value))
        if unknown:
            shown = ", ".join(key[:60] if key.isidentifier() else repr(key)[:60] for key in unknown[:20])
            raise ModelError(
                f"config.json has keys this architecture does not know: {shown}. "
                "They may change the computation, so the model is not loaded."
            )


def positive(key: str, value: object, high: float = math.inf, low: float = 0.0) -> float:
    """A finite number above 0, from `low` to `high`.

    Raises:
        ModelError: the value is something else.
    """
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not (0 < value < math.inf and low <= value <= high):  # type: ignore[operator]
        limits = f", from {low:g} to {high:g}" if high < math.inf else ""
        raise ModelError(f"config.json: {key}={value!r:.60}, expected a finite positive number{limits}")
    return float(value)  # type: ignore[arg-type]
