"""GLM-4.5 to 4.7: a few dense layers, then experts by sigmoid scores and one for all tokens; a part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import BLOCK, LLAMA_IGNORED, expert_rules, llama_rules, shared_expert_rules
from llm_infer.weights.gguf_names import EXPERT
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
_DEFAULTS = {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "num_key_value_heads": 8}


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Glm4MoeConfig`."""
    reader = ConfigReader(_DEFAULTS | dict(values))
    fields = reader.llama_like(partial=True)
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
    dense = config.moe.dense_first
    found = [
        *llama_rules(config),
        *(
            Rule(f"layers.dense_mlp.{name}.weight", (f"{BLOCK}mlp.{name}_proj.weight",), end=dense)
            for name in (EXPERT if dense else ())
        ),
        *(
            replace(rule, first=dense)
            for rule in (
                *expert_rules(config),
                Rule("layers.mlp.correction", (BLOCK + "mlp.gate.e_score_correction_bias",)),
                *shared_expert_rules("mlp.shared_experts"),
            )
        ),
    ]
    return [*found, _next_tokens(config, found)]


def _next_tokens(config: ModelConfig, rules: list[Rule]) -> Rule:
    """Names the tensors of the layer behind the last, which predicts further tokens and is not used."""
    number = str(config.num_layers)
    own = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head")
    names = [f"{BLOCK}{name}.weight" for name in own]
    names += [name for rule in rules if rule.stacked for name in rule.sources]
    names = [name.replace("{layer}", number) for name in dict.fromkeys(names)]
    return Rule("next_tokens", tuple(names), arrange=np.concatenate, optional=True)
