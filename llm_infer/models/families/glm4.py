"""GLM-4 (0414) and GLM-Z1, dense: a part of each head rotated in neighbouring pairs, norms before and after."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, gate_up_rules, llama_rules, qkv_rules
from llm_infer.weights.gguf_names import ATTENTION_BIAS, DENSE_LAYER, GGUFNames
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
_DEFAULTS = {
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "rms_norm_eps": 1.5625e-7,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_out_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_mlp_layernorm",
}
GGUF = GGUFNames(
    "glm4",
    {name: hf for name, hf in DENSE_LAYER.items() if name != "ffn_gate"}
    | {
        "ffn_up": "mlp.gate_up_proj",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    flags=ATTENTION_BIAS,
    partial_rotary=True,
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Glm4Config`."""
    reader = ConfigReader(_DEFAULTS | dict(values))
    result = ModelConfig(
        "Glm4ForCausalLM",
        **reader.llama_like(partial=True),
        qkv_bias=reader.flag("attention_bias", True),
        norms="both",
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result


def rules(config: ModelConfig) -> list[Rule]:
    """Names the tensors; rows that are rotated together are neighbours in the file."""
    assert config.rope is not None
    head_dim, rotated = config.head_dim, config.rope.rotated(config.head_dim)
    order = np.arange(head_dim)
    order[:rotated] = order[:rotated].reshape(-1, 2).T.reshape(-1)

    def halves(rows: np.ndarray) -> np.ndarray:
        if rows.shape[0] % head_dim:
            raise ValueError(f"{rows.shape[0]} rows for heads of size {head_dim}")
        return rows.reshape(-1, head_dim, *rows.shape[1:])[:, order].reshape(rows.shape)

    return llama_rules(config, _NORMS, partial(qkv_rules, order=halves), gate_up_rules)
