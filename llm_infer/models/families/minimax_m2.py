"""MiniMax M2: experts chosen by sigmoid scores with a correction, q/k norms over all heads, a part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.families.mixtral import MATRICES, ROUTER, name_sizes
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import BLOCK, LLAMA_IGNORED, expert_rules, llama_rules
from llm_infer.weights.gguf_names import MOE_LAYER, QK_NORMS, SIGMOID, GGUFNames
from llm_infer.weights.rules import Rule

IGNORED_TENSORS = LLAMA_IGNORED
_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 5e6, "num_key_value_heads": 8, "head_dim": 128}
_CORRECTION = "block_sparse_moe.e_score_correction_bias"
GGUF = GGUFNames(
    "minimax_m2",
    MOE_LAYER | ROUTER | QK_NORMS | {"exp_probs_b.bias": _CORRECTION},
    experts=True,
    expert_names=MATRICES,
    partial_rotary=True,
    keys={"expert_gating_func": "expert_gating_func"},
    adjust=name_sizes,
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `MiniMaxM2Config`, or of the published files, which say more."""
    reader = ConfigReader(_with_fraction(_DEFAULTS | dict(values)))
    fields = reader.llama_like(partial=True)
    for key, allowed in {
        "scoring_func": "sigmoid",
        "expert_gating_func": SIGMOID,
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
    }.items():
        reader.expect(key, allowed)
    kinds = reader.take("attn_type_list", [])
    if not isinstance(kinds, list) or any(kind != 1 for kind in kinds):
        raise ModelError(
            f"config.json: attn_type_list={kinds!r:.60} is not supported, expected a list of 1: softmax attention"
        )
    # Of training, of heads that predict further tokens, and of an MLP that no layer has.
    reader.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "shared_moe_mode")
    reader.ignore("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "mlp_intermediate_size")
    moe = MoEConfig(
        num_experts=reader.integer("num_local_experts", 256),
        experts_per_token=reader.integer("num_experts_per_tok", 8),
        intermediate_size=fields["intermediate_size"],
        scores="sigmoid",
        correction=True,
    )
    result = ModelConfig(
        "MiniMaxM2ForCausalLM",
        **fields,
        qk_norm_whole=True,
        windows=reader.sliding_windows(),
        moe=moe,
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result


def _with_fraction(values: dict[str, Any]) -> dict[str, Any]:
    """Says how much of a head is rotated in the way of the newer configs."""
    rotated, head_dim = values.pop("rotary_dim", None), values["head_dim"]
    if isinstance(rotated, int) and isinstance(head_dim, int) and head_dim:
        values.setdefault("partial_rotary_factor", rotated / head_dim)
    return values


def rules(config: ModelConfig) -> list[Rule]:
    """Names Llama's tensors, the router with its correction, and the experts."""
    return [
        *llama_rules(config),
        *expert_rules(config, "block_sparse_moe.gate", MATRICES),
        Rule("layers.mlp.correction", (BLOCK + _CORRECTION,)),
    ]
