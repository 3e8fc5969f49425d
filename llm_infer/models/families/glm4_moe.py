"""GLM-4.5 to 4.7: a few dense layers, then experts by sigmoid scores and one for all tokens; a part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import BLOCK, LLAMA_IGNORED, expert_rules, llama_rules, shared_expert_rules
from llm_infer.weights.gguf_names import (
    ATTENTION_BIAS,
    DENSE_LAYER,
    EXPERT,
    MOE_LAYER,
    QK_NORMS,
    SIGMOID,
    GGUFNames,
    shared_expert_layer,
)
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
_DEFAULTS = {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "num_key_value_heads": 8}
_CORRECTION = "mlp.gate.e_score_correction_bias"
_NEXT = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head")
"""What only the layer behind the last has, which predicts further tokens."""


def _name_layers(config: dict[str, Any]) -> None:
    """Counts layers without those that predict further tokens, and names experts as this family's configs do."""
    config["num_hidden_layers"] -= config["num_nextn_predict_layers"]
    config["n_routed_experts"] = config.pop("num_experts")


GGUF = GGUFNames(
    "glm4_moe",
    {name: hf for name, hf in (DENSE_LAYER | MOE_LAYER | QK_NORMS).items() if name != "ffn_norm"}
    | {"post_attention_norm": "post_attention_layernorm", "exp_probs_b.bias": _CORRECTION}
    | shared_expert_layer("mlp.shared_experts")
    | {f"nextn.{name.replace('.', '_')}": name for name in _NEXT},
    flags=ATTENTION_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
    experts=True,
    partial_rotary=True,
    keys={
        "expert_gating_func": "expert_gating_func",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "expert_shared_count": "n_shared_experts",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
        "leading_dense_block_count": "first_k_dense_replace",
        "nextn_predict_layers": "num_nextn_predict_layers",
    },
    values={"hidden_act": "silu", "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
    adjust=_name_layers,
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Glm4MoeConfig`."""
    reader = ConfigReader(_DEFAULTS | dict(values))
    fields = reader.llama_like(partial=True)
    reader.expect("expert_gating_func", SIGMOID)
    reader.ignore("num_nextn_predict_layers", "num_mtp_layers", "output_router_logits")
    inner = reader.integer("moe_intermediate_size", 1408)
    moe = MoEConfig(
        num_experts=reader.integer("n_routed_experts", 128),
        experts_per_token=reader.integer("num_experts_per_tok", 8),
        intermediate_size=inner,
        norm_topk_prob=reader.flag("norm_topk_prob", True),
        shared_size=inner * reader.integer("n_shared_experts", 1),
        scores="sigmoid",
        correction=True,
        groups=reader.integer("n_group", 1),
        top_groups=reader.integer("topk_group", 1),
        scale=reader.number("routed_scaling_factor", 1.0),
        dense_first=reader.count("first_k_dense_replace", 1),
    )
    result = ModelConfig(
        "Glm4MoeForCausalLM",
        **fields,
        qkv_bias=reader.flag("attention_bias", False),
        qk_norm=reader.flag("use_qk_norm", False),
        moe=moe,
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result


def rules(config: ModelConfig) -> list[Rule]:
    """Names Llama's tensors, the dense layers' MLP, the router with its correction, the experts, and the one of all tokens."""
    assert config.moe is not None
    dense = range(config.moe.dense_first)
    found = [
        *llama_rules(config),
        *(
            Rule(f"layers.dense_mlp.{name}.weight", (f"{BLOCK}mlp.{name}_proj.weight",), layers=dense)
            for name in (EXPERT if dense else ())
        ),
        *(
            replace(rule, layers=range(len(dense), config.num_layers))
            for rule in (
                *expert_rules(config),
                Rule("layers.mlp.correction", (BLOCK + _CORRECTION,)),
                *shared_expert_rules("mlp.shared_experts"),
            )
        ),
    ]
    return [*found, _next_tokens(config, found)]


def _next_tokens(config: ModelConfig, rules: list[Rule]) -> Rule:
    """Names the tensors of the layer behind the last, which predicts further tokens and is not used."""
    number = str(config.num_layers)
    names = [f"{BLOCK}{name}.weight" for name in _NEXT]
    names += [name for rule in rules if rule.stacked for name in rule.sources]
    names = [name.replace("{layer}", number) for name in dict.fromkeys(names)]
    return Rule("next_tokens", tuple(names), arrange=np.concatenate, optional=True)
