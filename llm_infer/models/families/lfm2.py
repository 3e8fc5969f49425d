"""LFM2, dense (Liquid AI, 2025): short convolutions in most layers, attention with normalised heads in the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.config_numbers import MAX_FACTOR
from llm_infer.models.hf_config import CONV, FULL, ConfigReader
from llm_infer.models.names import BLOCK, LLAMA_IGNORED, qkv_rules
from llm_infer.weights.gguf_names import GGUFNames
from llm_infer.weights.rules import Arrange, Rule

IGNORED_TENSORS = LLAMA_IGNORED
_DEFAULTS = {
    "intermediate_size": 12288,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "vocab_size": 65536,
}
_NEWER_NAMES = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
"""Keys of the first published configs, which transformers prefers, → those that they stand for."""
MLP = {"gate": "w1", "up": "w3", "down": "w2"}
_NORMS = {"attn_norm": "operator_norm", "mlp_norm": "ffn_norm"}
_HEAD_NORMS = {"attn.q_norm": "self_attn.q_layernorm", "attn.k_norm": "self_attn.k_layernorm"}


def as_published(config: dict[str, Any]) -> None:
    """Names the epsilon as this family's configs do."""
    config["norm_eps"] = config.pop("rms_norm_eps")


GGUF = GGUFNames(
    "lfm2",
    {
        "attn_norm": "operator_norm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "ffn_norm": "ffn_norm",
        **{f"ffn_{name}": f"feed_forward.{tensor}" for name, tensor in MLP.items()},
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
    },
    {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"},
    keys={"shortconv.l_cache": "conv_L_cache"},
    # The file says the size that comes of the adjustment.
    values={"block_auto_adjust_ff_dim": False},
    convolutions=True,
    adjust=as_published,
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Lfm2Config`.

    Raises:
        ModelError: also for a list of layers that attend which names others than there are.
    """
    values = _DEFAULTS | {key: value for key, value in values.items() if value is not None}
    values |= {newer: values.pop(older) for older, newer in _NEWER_NAMES.items() if older in values}
    reader = ConfigReader(values)
    fields = reader.sizes("norm_eps")
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        reader.expect(key, fields["hidden_size"])
    reader.expect("num_heads", fields["num_heads"])
    reader.expect("hidden_act", "silu", "swish")
    reader.expect("block_use_swiglu", True)
    reader.expect("use_pos_enc", True)
    # How weights begin, and what transformers has under another name.
    reader.ignore("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
    reader.ignore("block_norm_eps", "theta")
    fields["intermediate_size"] = _inner_size(reader, fields["intermediate_size"])
    fields |= mixing(reader, _layer_types(reader, fields["num_layers"]))
    result = ModelConfig("Lfm2ForCausalLM", **fields, fused_qkv=fused_qkv)
    reader.finish()
    return result


def mixing(reader: ConfigReader, layer_types: Sequence[str]) -> dict[str, Any]:
    """Reads the fields of `ModelConfig` on how layers mix tokens, and on the head, which the models with experts share.

    Raises:
        ModelError: none of the layers attends.
    """
    if FULL not in layer_types:
        raise ModelError("config.json: no layer attends, which is not supported")
    return {
        "rope": reader.rope(theta=1e6),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
        "qk_norm": True,
        "kinds": tuple("attention" if kind == FULL else "conv" for kind in layer_types),
        "conv_taps": reader.integer("conv_L_cache", 3),
        "conv_bias": reader.flag("conv_bias", False),
    }


def _inner_size(reader: ConfigReader, size: int) -> int:
    """Returns the size of the MLP, which the configs may state before it is adjusted."""
    multiplier = reader.number("block_ffn_dim_multiplier", 1.0, high=MAX_FACTOR)
    multiple = reader.integer("block_multiple_of", 256)
    if not reader.flag("block_auto_adjust_ff_dim", True):
        return size
    return -(-int(multiplier * int(2 * size / 3)) // multiple) * multiple


def _layer_types(reader: ConfigReader, layers: int) -> list[str]:
    """Reads the kind of each layer; older configs list those that attend."""
    attending = reader.take("full_attn_idxs", list(range(layers)))
    numbers = range(layers)
    if not isinstance(attending, list) or not all(type(each) is int and each in numbers for each in attending):
        raise ModelError(f"config.json: full_attn_idxs={attending!r:.60}, expected numbers of the {layers} layers")
    chosen = set(attending)
    return reader.kinds([FULL if layer in chosen else CONV for layer in numbers], FULL, CONV)


def rules(config: ModelConfig) -> list[Rule]:
    """Says where each parameter comes from, by Hugging Face tensor name."""
    return [*rules_but_mlp(config), *mlp_rules("mlp")]


def mlp_rules(mlp: str) -> list[Rule]:
    """Names the matrices of a dense MLP, whose parameters have this name within a layer."""
    return [
        Rule(f"layers.{mlp}.{name}.weight", (f"{BLOCK}feed_forward.{tensor}.weight",)) for name, tensor in MLP.items()
    ]


def rules_but_mlp(config: ModelConfig) -> list[Rule]:
    """Names all parameters but those of the MLP."""
    attending, convolving = config.layers_of("attention"), config.layers_of("conv")
    attention = [
        *qkv_rules(config),
        *(Rule(f"layers.{name}.weight", (f"{BLOCK}{tensor}.weight",)) for name, tensor in _HEAD_NORMS.items()),
        Rule("layers.attn.o.weight", (f"{BLOCK}self_attn.out_proj.weight",)),
    ]
    return [
        Rule("embed.weight", ("model.embed_tokens.weight",)),
        *(Rule(f"layers.{name}.weight", (f"{BLOCK}{tensor}.weight",)) for name, tensor in _NORMS.items()),
        *(replace(rule, layers=attending) for rule in attention),
        *(replace(rule, layers=convolving) for rule in (_conv_rules(config) if convolving else ())),
        Rule("final_norm.weight", ("model.embedding_norm.weight",)),
        *([] if config.tie_word_embeddings else [Rule("head.weight", ("lm_head.weight",))]),
    ]


def _conv_rules(config: ModelConfig) -> list[Rule]:
    """Names what the layers with convolutions have; the file holds the three matrices that read the input below each other."""
    width, parts = config.hidden_size, ("weight", "bias") if config.conv_bias else ("weight",)
    found = [Rule("layers.conv.taps", (f"{BLOCK}conv.conv.weight",), arrange=_without_unit, back=_with_unit)]
    if config.conv_bias:
        found.append(Rule("layers.conv.taps_bias", (f"{BLOCK}conv.conv.bias",)))
    for part in parts:
        source = (f"{BLOCK}conv.in_proj.{part}",)
        found += [
            Rule(f"layers.conv.{name}.{part}", source, arrange=_third(number, width))
            for number, name in enumerate(("b", "c", "x"))
        ]
        found.append(Rule(f"layers.conv.out.{part}", (f"{BLOCK}conv.out_proj.{part}",)))
    return found


def _third(number: int, width: int) -> Arrange:
    """Takes one of three equal parts of the rows."""

    def part(tensors: Sequence[np.ndarray]) -> np.ndarray:
        if tensors[0].shape[0] != 3 * width:
            raise ValueError(f"{tensors[0].shape[0]} rows for three times {width}")
        return tensors[0][number * width : (number + 1) * width]

    return part


def _without_unit(tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Takes the axis of length 1 away that Hugging Face's files have behind the channels, and llama.cpp's have not."""
    return tensors[0].reshape(tensors[0].shape[0], -1)


def _with_unit(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Undoes `_without_unit`."""
    return [array[:, None] for array in arrays]
