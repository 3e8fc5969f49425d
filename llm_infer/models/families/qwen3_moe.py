"""Qwen3 mixtures of experts: Qwen3 with routed experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, expert_rules, llama_rules
from llm_infer.weights.gguf_names import ATTENTION_BIAS, MOE_LAYER, QK_NORMS, GGUFNames
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames("qwen3_moe", MOE_LAYER | QK_NORMS, flags=ATTENTION_BIAS, experts=True)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Qwen3MoeConfig`."""
    # transformers 5 writes the number of experts under another name than the published configs.
    renamed = {"num_experts" if key == "num_local_experts" else key: value for key, value in values.items()}
    reader = ConfigReader(renamed)
    reader.full_attention()
    moe = experts_of(reader)
    result = ModelConfig(
        "Qwen3MoeForCausalLM",
        **reader.llama_like(),
        **reader.attention_biases(),
        qk_norm=True,
        moe=moe,
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result


def experts_of(reader: ConfigReader, **more: Any) -> MoEConfig:
    """Reads Qwen's experts.

    Raises:
        ModelError: some layers are dense; no such model is published.
    """
    reader.expect("decoder_sparse_step", 1)
    if dense := reader.take("mlp_only_layers", []):
        raise ModelError(f"config.json: mlp_only_layers={dense!r} is not supported, expected []: experts in all layers")
    reader.ignore("output_router_logits", "router_aux_loss_coef")  # of training
    return MoEConfig(
        num_experts=reader.integer("num_experts"),
        experts_per_token=reader.integer("num_experts_per_tok"),
        intermediate_size=reader.integer("moe_intermediate_size"),
        norm_topk_prob=reader.flag("norm_topk_prob", False),
        **more,
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Names Qwen3's tensors, the router and the experts."""
    return [*llama_rules(config), *expert_rules(config)]
