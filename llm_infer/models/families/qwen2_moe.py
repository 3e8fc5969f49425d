"""Qwen 1.5 and 2 mixtures of experts: Qwen2 with routed experts, and one for all tokens behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.families.qwen3_moe import experts_of
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import BLOCK, LLAMA_IGNORED, expert_rules, llama_rules, shared_expert_rules
from llm_infer.weights.gguf_names import MOE_LAYER, GGUFNames, shared_expert_layer
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames(
    "qwen2_moe",
    MOE_LAYER | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"} | shared_expert_layer("mlp.shared_expert"),
    experts=True,
    keys={"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    adjust=lambda config: config.update(norm_topk_prob=False),
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Qwen2MoeConfig`."""
    reader = ConfigReader(values)
    reader.full_attention()
    shared = reader.integer("shared_expert_intermediate_size", 5632)
    moe = experts_of(reader, shared_size=shared, shared_gate=True)
    result = ModelConfig(
        "Qwen2MoeForCausalLM",
        **reader.llama_like(),
        qkv_bias=reader.flag("qkv_bias", True),
        moe=moe,
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result


def rules(config: ModelConfig) -> list[Rule]:
    """Names Qwen2's tensors, router and experts, and the expert of all tokens with its gate."""
    return [
        *llama_rules(config),
        *expert_rules(config),
        *shared_expert_rules("mlp.shared_expert"),
        Rule("layers.mlp.shared_weight.weight", (BLOCK + "mlp.shared_expert_gate.weight",)),
    ]
