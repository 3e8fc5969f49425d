"""Gemma 2: windows in every other layer, soft-caps of scores and logits, norms before and after, GeGLU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import BOTH_NORMS, LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import DENSE_LAYER, OUT_NORMS, WINDOW_KEYS, GGUFNames

rules = partial(llama_rules, norms=BOTH_NORMS)
IGNORED_TENSORS = LLAMA_IGNORED


def _scale(config: dict[str, Any]) -> None:
    """Sets what scales the scores, which the file does not say: the size of a head, but for the 27B model."""
    largest = config["num_hidden_layers"] == 46
    width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = width if largest else config["head_dim"]


GGUF = GGUFNames(
    "gemma2",
    DENSE_LAYER | OUT_NORMS | {"ffn_norm": "pre_feedforward_layernorm"},
    norms_with_one=True,
    keys=WINDOW_KEYS
    | {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    values={"hidden_activation": "gelu_pytorch_tanh"},
    adjust=_scale,
)


_DEFAULTS = {"head_dim": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Gemma2Config`."""
    reader = ConfigReader(_DEFAULTS | dict(values))
    sizes = reader.sizes()
    reader.expect("use_bidirectional_attention", False)
    # Both spellings of the activation are published; transformers reads this one.
    reader.take("hidden_act", "")
    result = ModelConfig(
        "Gemma2ForCausalLM",
        **sizes,
        rope=reader.rope(),
        windows=reader.layer_windows(reader.integer("sliding_window"), reader.layer_kinds(2)),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        norms="both",
        add_one_to_norms=True,
        activation=reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=sizes["hidden_size"] ** 0.5,
        attention_scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=reader.optional_number("attn_logit_softcapping"),
        logit_softcap=reader.optional_number("final_logit_softcapping"),
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
