"""Gemma 3, text: windows in five of six layers, with rotations of their own; norms before and after; GeGLU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import BOTH_NORMS, LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import DENSE_LAYER, OUT_NORMS, QK_NORMS, WINDOW_KEYS, GGUFNames

rules = partial(llama_rules, norms=BOTH_NORMS)
IGNORED_TENSORS = LLAMA_IGNORED


def _scale(config: dict[str, Any]) -> None:
    """Sets what scales the scores, which the file does not say: the size of a head, but for the 27B model."""
    largest = config["num_hidden_layers"] == 62
    width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = width if largest else config["head_dim"]


GGUF = GGUFNames(
    "gemma3_text",
    DENSE_LAYER | OUT_NORMS | {"ffn_norm": "pre_feedforward_layernorm"} | QK_NORMS,
    norms_with_one=True,
    keys=WINDOW_KEYS
    | {
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    values={"hidden_activation": "gelu_pytorch_tanh"},
    adjust=_scale,
)


_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""What transformers assumes where the config is silent: published ones leave out what is as in the 4B model."""


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Gemma3TextConfig`."""
    reader = ConfigReader(_DEFAULTS | {key: value for key, value in values.items() if value is not None})
    sizes = reader.sizes()
    reader.expect("use_bidirectional_attention", False)
    reader.expect(
        "attn_logit_softcapping", None
    )  # null in all that are published; transformers has the key and does not use it
    pattern = reader.integer("sliding_window_pattern", reader.integer("_sliding_window_pattern", 6))
    kinds = reader.layer_kinds(pattern)
    result = ModelConfig(
        "Gemma3ForCausalLM",
        **sizes,
        **reader.layer_ropes(kinds, 1e6, 1e4),
        windows=reader.layer_windows(reader.integer("sliding_window", 4096), kinds),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        qk_norm=True,
        norms="both",
        add_one_to_norms=True,
        activation=reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=sizes["hidden_size"] ** 0.5,
        attention_scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=reader.optional_number("final_logit_softcapping"),
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
