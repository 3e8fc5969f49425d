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


def gguf_names(model_type: str, layers_of_27b: int, layer_names: dict[str, str], keys: dict[str, str]) -> GGUFNames:
    """Makes the names of one version of Gemma, of which some are beside those of all versions."""

    def scale(config: dict[str, Any]) -> None:
        """Sets what scales the scores, which the file does not say: the size of a head, but for the 27B model."""
        width = config["hidden_size"] // config["num_attention_heads"]
        largest = config["num_hidden_layers"] == layers_of_27b
        config["query_pre_attn_scalar"] = width if largest else config["head_dim"]

    return GGUFNames(
        model_type,
        DENSE_LAYER | OUT_NORMS | {"ffn_norm": "pre_feedforward_layernorm"} | layer_names,
        norms_with_one=True,
        keys=WINDOW_KEYS | {"final_logit_softcapping": "final_logit_softcapping"} | keys,
        values={"hidden_activation": "gelu_pytorch_tanh"},
        adjust=scale,
    )


GGUF = gguf_names("gemma2", 46, {}, {"attn_logit_softcapping": "attn_logit_softcapping"})
_DEFAULTS = {"head_dim": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Gemma2Config`."""
    reader = ConfigReader(_DEFAULTS | dict(values))
    # Both spellings of the activation are published; transformers reads this one.
    reader.take("hidden_act", "")
    result = ModelConfig(
        "Gemma2ForCausalLM",
        **common_fields(reader),
        rope=reader.rope(),
        windows=reader.layer_windows(reader.integer("sliding_window"), reader.layer_kinds(2)),
        attention_softcap=reader.optional_number("attn_logit_softcapping"),
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result


def common_fields(reader: ConfigReader) -> dict[str, Any]:
    """Reads the fields of `ModelConfig` that all versions of Gemma spell the same way."""
    reader.expect("use_bidirectional_attention", False)
    sizes = reader.sizes()
    return {
        **sizes,
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
        "norms": "both",
        "add_one_to_norms": True,
        "activation": reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        "attention_scale": reader.number("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": reader.optional_number("final_logit_softcapping"),
    }
