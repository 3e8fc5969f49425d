"""LFM2 with experts (Liquid AI, 2025): LFM2's layers, with routed experts in place of the MLP behind the first few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.families import lfm2
from llm_infer.models.hf_config import CONV, FULL, ConfigReader
from llm_infer.models.names import BLOCK, LLAMA_IGNORED, expert_rules
from llm_infer.weights.gguf_names import SIGMOID
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
_DEFAULTS = {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 65536,
}
_ROUTER, _CORRECTION = "feed_forward.gate", "feed_forward.expert_bias"
_EXPERT = {name: f"feed_forward.experts.{{x}}.{tensor}" for name, tensor in lfm2.MLP.items()}
GGUF = replace(
    lfm2.GGUF,
    model_type="lfm2_moe",
    layer_names={**lfm2.GGUF.layer_names, "ffn_gate_inp": _ROUTER, "exp_probs_b.bias": _CORRECTION},
    experts=True,
    expert_names=_EXPERT,
    keys={
        **lfm2.GGUF.keys,
        "expert_gating_func": "expert_gating_func",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
        "leading_dense_block_count": "num_dense_layers",
    },
    values={"num_dense_layers": 0},
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Lfm2MoeConfig`."""
    values = _DEFAULTS | {key: value for key, value in values.items() if value is not None}
    if "tie_embedding" in values:  # which transformers prefers
        values["tie_word_embeddings"] = values.pop("tie_embedding")
    reader = ConfigReader(values)
    fields = reader.sizes("norm_eps")
    reader.take("layer_types")  # there is no pattern that would hold without them
    fields |= lfm2.mixing(reader, reader.kinds([FULL] * fields["num_layers"], FULL, CONV))
    reader.expect("hidden_act", "silu", "swish")
    reader.expect("expert_gating_func", SIGMOID)
    reader.ignore("output_router_logits", "router_aux_loss_coef")  # of training
    moe = MoEConfig(
        num_experts=reader.integer("num_experts", 32),
        experts_per_token=reader.integer("num_experts_per_tok", 4),
        intermediate_size=reader.integer("moe_intermediate_size", 1792),
        norm_topk_prob=reader.flag("norm_topk_prob", True),
        norm_epsilon=1e-6,
        scores="sigmoid",
        correction=reader.flag("use_expert_bias", True),
        scale=reader.number("routed_scaling_factor", 1.0),
        dense_first=reader.count("num_dense_layers", 2),
    )
    result = ModelConfig("Lfm2MoeForCausalLM", **fields, moe=moe, fused_qkv=fused_qkv)
    reader.finish()
    return result


def rules(config: ModelConfig) -> list[Rule]:
    """Names LFM2's tensors, the dense layers' MLP, and the router with its correction and experts of the others."""
    assert config.moe is not None
    dense = range(config.moe.dense_first)
    routed = expert_rules(config, _ROUTER, _EXPERT)
    if config.moe.correction:
        routed.append(Rule("layers.mlp.correction", (BLOCK + _CORRECTION,)))
    return [
        *lfm2.rules_but_mlp(config),
        *(replace(rule, layers=dense) for rule in (lfm2.mlp_rules("dense_mlp") if dense else ())),
        *(replace(rule, layers=range(len(dense), config.num_layers)) for rule in routed),
    ]
