"""Shows GGUF models as Hugging Face would store them: tensor names, row order of queries and keys, and the config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.weights.gguf import GGUFFile, GGUFTensor
from llm_infer.weights.gguf_names import GGUFNames
from llm_infer.weights.gguf_rope import ATTENTION_FACTOR, LONG_FACTORS, YARN_KEYS, rope_scaling
from pallas_kernels.quant_matmul.formats import FORMATS

_EXPERT_STACKS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}

_KV_HEADS = "attention.head_count_kv"
_PATTERN = "attention.sliding_window_pattern"
_ROPE_FACTORS = "rope_freqs.weight"  # read as part of the config, not as a weight

# fmt: off
# Keys below "<architecture>." from which the config is made. Others may change the computation and are refused.
_KNOWN_KEYS = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_count",
        "expert_used_count",
    }
)
# fmt: on

# Keys that change nothing where they have these values.
_NEUTRAL_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "decoder_start_token_id": (-1,),
    "embedding_scale": (1.0,),
    "expert_shared_count": (0,),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (1,),
    "leading_dense_block_count": (0,),
    "logit_scale": (1.0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (1.0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}


def gguf_to_hf_config(file: GGUFFile, hf_class: str, architecture: GGUFNames) -> dict[str, Any]:
    """Returns a model's metadata as the dict that its Hugging Face `config.json` would hold.

    Args:
        file: the model.
        hf_class: Hugging Face's class for its architecture.
        architecture: names of its tensors and keys.

    Raises:
        ModelError: a key is unknown, a key is missing, or a value has the wrong type.
    """
    prefix = file.require("general.architecture", str) + "."
    present = {key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)}
    known = _KNOWN_KEYS | architecture.keys.keys() | YARN_KEYS.keys()
    known |= {"expert_feed_forward_length"} if architecture.experts else set()
    known |= {ATTENTION_FACTOR} if LONG_FACTORS[0] in file.tensors else set()
    known |= {_PATTERN} if "attention.sliding_window" in architecture.keys else set()
    neutral = {key for key in present & _NEUTRAL_KEYS.keys() if _is_neutral(key, file.metadata[prefix + key])}
    if unknown := sorted(present - known - neutral):
        raise ModelError(
            f"{file.path}: metadata keys of {prefix[:-1]!r} that are not understood and may change the computation: "
            + ", ".join(key if key.isprintable() else repr(key) for key in (prefix + k[:80] for k in unknown[:5]))
        )

    def integer(key: str, default: int | None = None) -> int:
        if default is not None and key not in present:
            return default
        return _integer(file, prefix + key)

    def number(key: str, default: float | None = None) -> float:
        if default is not None and key not in present:
            return default
        # The file holds float32: its shortest decimal form is the number of the original config (1e-05, not 9.99…e-06).
        value = float(str(np.float32(file.require(prefix + key, (int, float)))))
        if not (math.isfinite(value) and value > 0):
            raise ModelError(f"{file.path}: metadata {prefix + key}={value}, expected a finite positive number")
        return value

    for key in () if architecture.experts else ("expert_count", "expert_used_count"):
        if key in present and file.require(prefix + key, int) != 0:
            raise ModelError(
                f"{file.path}: metadata {prefix + key}: mixtures of experts are not known of {prefix[:-1]!r}"
            )
    heads, width = integer("attention.head_count"), integer("embedding_length")
    head_dim = integer("attention.key_length", max(width // heads, 1))
    rotated = integer("rope.dimension_count", head_dim)
    for key in ("attention.value_length", *(() if architecture.partial_rotary else ("rope.dimension_count",))):
        if (found := integer(key, head_dim)) != head_dim:
            raise ModelError(f"{file.path}: metadata {prefix + key}={found}, expected the head size {head_dim}")
    theta = number("rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        **architecture.values,
        "architectures": [hf_class],
        "model_type": architecture.model_type,
        "vocab_size": integer("vocab_size", _vocab_size(file)),
        "hidden_size": width,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(file, architecture) or heads,
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(file, prefix, theta, rotated, file.tensors.get(_ROPE_FACTORS)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if architecture.partial_rotary:
        config["partial_rotary_factor"] = rotated / head_dim
    for key, tensor in architecture.flags.items():
        config[key] = tensor in file.tensors
    if architecture.experts:
        config |= {
            "num_experts": integer("expert_count"),
            "num_experts_per_tok": integer("expert_used_count"),
            "moe_intermediate_size": integer("expert_feed_forward_length", config["intermediate_size"]),
            # The file does not say; llama.cpp normalises the weights of every model of this architecture.
            "norm_topk_prob": True,
        }
    for key, hf_key in architecture.keys.items():
        if key in present - neutral:
            value = file.metadata[prefix + key]
            whole = isinstance(value, int)
            config[hf_key] = value if isinstance(value, bool) else integer(key) if whole else number(key)
    if _PATTERN in present:
        config["layer_types"] = _layer_types(file, prefix + _PATTERN, config["num_hidden_layers"])
    if architecture.convolutions:
        config["layer_types"] = _mixers(file, prefix + _KV_HEADS, config["num_hidden_layers"])
    for name in ("bos", "eos"):
        if (key := f"tokenizer.ggml.{name}_token_id") in file.metadata:
            config[f"{name}_token_id"] = file.require(key, int)
    if architecture.adjust is not None:
        architecture.adjust(config)
    return config


def _layer_types(file: GGUFFile, key: str, layers: int) -> list[str]:
    """Reads which layers have a window: a flag for each, or a number n: all but every n-th."""
    value = file.metadata[key]
    if isinstance(value, int) and not isinstance(value, bool):
        value = [bool((i + 1) % _integer(file, key)) for i in range(layers)]
    flags = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(flags, list) or len(flags) != layers or not all(isinstance(each, bool) for each in flags):
        raise ModelError(
            f"{file.path}: metadata {key}={value!r:.80}, expected true or false for each of {layers} layers"
        )
    return ["sliding_attention" if each else "full_attention" for each in flags]


def _kv_heads(file: GGUFFile, architecture: GGUFNames) -> int | None:
    """Returns the number of KV heads of the layers that attend; None where the file does not say."""
    key = f"{file.require('general.architecture', str)}.{_KV_HEADS}"
    if key not in file.metadata:
        return None
    value = file.metadata[key]
    if architecture.convolutions and isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return _equal(file, key, value[value != 0])
    return _integer(file, key)


def _mixers(file: GGUFFile, key: str, layers: int) -> list[str]:
    """Reads which layers attend: those with KV heads; all where there is one number for all of them."""
    value = file.metadata.get(key)
    if not isinstance(value, np.ndarray):
        return ["full_attention"] * layers
    if len(value) != layers:
        raise ModelError(
            f"{file.path}: metadata {key} has {len(value)} numbers, expected one for each of {layers} layers"
        )
    return ["full_attention" if each else "conv" for each in value.tolist()]


def _is_neutral(key: str, value: Any) -> bool:
    """Checks whether a key of `_NEUTRAL_KEYS` has one of its values there."""
    return any(type(value) is type(each) and value == each for each in _NEUTRAL_KEYS[key])


def _integer(file: GGUFFile, key: str) -> int:
    """Returns a positive whole number; a list with one for each layer counts if all are equal."""
    return _equal(file, key, file.metadata.get(key))


def _equal(file: GGUFFile, key: str, value: Any) -> int:
    """Returns what `_integer` does, of a key's value."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value == value[0]).all():
        value = int(value[0])
    else:
        value = file.require(key, int)
    if not 1 <= value < 1 << 31:
        raise ModelError(f"{file.path}: metadata {key}={value}, expected a positive whole number below 2^31")
    return value


def _vocab_size(file: GGUFFile) -> int:
    """Returns the number of rows of the embedding; files written before 2024 do not state the size."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: tensor 'token_embd.weight' is missing")
    return embedding.shape[0]


class GGUFSource:
    """The tensors of a GGUF file under Hugging Face names, rows in Hugging Face order (a `TensorSource`).

    Tensors that the architecture's table does not know keep their name in the file, so that the loader reports them.

    Raises:
        ModelError: the head counts are missing.
    """

    def __init__(self, file: GGUFFile, architecture: GGUFNames) -> None:
        self.file, self._with_one = file, architecture.norms_with_one
        self._tensors: dict[str, GGUFTensor] = {}
        self._heads: dict[str, int] = {}
        prefix = file.require("general.architecture", str)
        heads = _integer(file, f"{prefix}.attention.head_count")
        kv_heads = _kv_heads(file, architecture) or heads
        reordered = {"attn_q": heads, "attn_k": kv_heads} if architecture.interleaved_rope else {}
        for name, tensor in file.tensors.items():
            if name == _ROPE_FACTORS or name in LONG_FACTORS:
                continue
            if architecture.experts and (stack := _expert_stack(name, architecture)) is not None:
                for expert in range(tensor.shape[0]):
                    self._tensors[stack.replace("{x}", str(expert))] = tensor.part(expert)
                continue
            hf_name, base = _hf_name(name, architecture)
            self._tensors[hf_name] = tensor
            if base in reordered:
                self._heads[hf_name] = reordered[base]

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._tensors.keys()

    @property
    def description(self) -> str:
        """The path of the file."""
        return str(self.file.path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, row-major."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of the values as read; float32 for block-quantised tensors."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> GGUFTensor:
        """Returns the tensor itself, in the file's row order; see `row_order`."""
        return self._tensors[name]

    def row_order(self, name: str) -> np.ndarray | None:
        """Returns, for row i in Hugging Face order, its row in the file; None where they agree.

        Block rows are whole rows, so quantised blocks may be gathered in this order without decoding them.
        """
        if name not in self._heads:
            return None
        rows, heads = self._tensors[name].shape[0], self._heads[name]
        if heads < 1 or rows % (2 * heads):
            raise ModelError(
                f"{self.description}: {name}: {rows} rows are not an even number for each of {heads} heads"
            )
        # A head's rows are (pair, half) in the file and (half, pair) in Hugging Face's order.
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads all values into `out`, which has the tensor's shape, and converts them to its type."""
        self._tensors[name].read_into(out, self.row_order(name))
        if self._with_one and len(out.shape) == 1 and name.endswith("norm.weight"):
            out -= np.asarray(1, out.dtype)

    def stored_kind(self, name: str) -> str | None:
        """Returns the kind of a matrix in blocks that a kernel multiplies with; None for other tensors."""
        tensor = self._tensors[name]
        kind = tensor.type.lower()
        return kind if len(tensor.shape) == 2 and kind in FORMATS and FORMATS[kind].dtype == "uint8" else None

    def stored(self, name: str) -> tuple[str, np.ndarray] | None:
        """Returns the kind and block rows [N, R] of such a matrix, gathered in Hugging Face order; None for other tensors."""
        if (kind := self.stored_kind(name)) is None:
            return None
        blocks, order = self._tensors[name].blocks, self.row_order(name)
        return kind, blocks if order is None else blocks[order]

    def close(self) -> None:
        """Lets go of the file."""
        self._tensors = {}
        self.file.close()


def _hf_name(name: str, architecture: GGUFNames) -> tuple[str, str]:
    """Returns the Hugging Face name, and the name within the block without its suffix; unknown names come back unchanged."""
    base, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return name, ""
    if base in architecture.global_names:
        return f"{architecture.global_names[base]}.{suffix}", base
    parts = base.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal():
        within, own = f"model.layers.{int(parts[1])}.", architecture.layer_names
        if (whole := f"{parts[2]}.{suffix}") in own:
            return within + own[whole], parts[2]
        if parts[2] in own:
            return f"{within}{own[parts[2]]}.{suffix}", parts[2]
    return name, ""


def _expert_stack(name: str, architecture: GGUFNames) -> str | None:
    """Returns the Hugging Face name of the matrices stacked in a tensor, `{x}` for an expert's number; None for other tensors."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _EXPERT_STACKS and parts[3] in ("weight", "bias"):
        return f"model.layers.{int(parts[1])}.{architecture.expert_names[_EXPERT_STACKS[parts[2]]]}.{parts[3]}"
    return None
