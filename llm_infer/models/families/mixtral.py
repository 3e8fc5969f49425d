"""Mixtral: Mistral with routed experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, expert_rules, llama_rules
from llm_infer.weights.gguf_names import MOE_LAYER, GGUFNames
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
MATRICES = {name: f"block_sparse_moe.experts.{{x}}.{w}" for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))}
ROUTER = {"ffn_gate_inp": "block_sparse_moe.gate"}


def name_sizes(config: dict[str, Any]) -> None:
    """Names the sizes of experts, of which every layer has some, as this family's configs do."""
    del config["norm_topk_prob"]
    config["num_local_experts"] = config.pop("num_experts")
    config["intermediate_size"] = config.pop("moe_intermediate_size")


GGUF = GGUFNames(
    "mixtral", MOE_LAYER | ROUTER, interleaved_rope=True, experts=True, expert_names=MATRICES, adjust=name_sizes
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `MixtralConfig`."""
    reader = ConfigReader({"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, **values})
    fields = reader.llama_like()
    reader.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # of training
    moe = MoEConfig(
        num_experts=reader.integer("num_local_experts", 8),
        experts_per_token=reader.integer("num_experts_per_tok", 2),
        intermediate_size=fields["intermediate_size"],
    )
    result = ModelConfig("MixtralForCausalLM", **fields, windows=reader.sliding_windows(), moe=moe, fused_qkv=fused_qkv)
    reader.finish()
    return result


def rules(config: ModelConfig) -> list[Rule]:
    """Names Llama's tensors, the router and the experts."""
    return [*llama_rules(config), *expert_rules(config, "block_sparse_moe.gate", MATRICES)]
