"""gpt-oss: windows in every other layer, sinks, biases everywhere, experts with a clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.families import gpt_oss_stacks
from llm_infer.models.families.gpt_oss_tensors import ExpertTensors
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import BLOCK, LLAMA_IGNORED, expert_rules, llama_rules
from llm_infer.weights.gguf_names import DENSE_LAYER, WINDOW_KEYS, GGUFNames
from llm_infer.weights.rules import Rule

tensors = ExpertTensors
stacks = gpt_oss_stacks.stacks
IGNORED_TENSORS = LLAMA_IGNORED


def _rotation(config: dict[str, Any]) -> None:
    """Sets what the published config says of YaRN beside what the file does."""
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["truncate"] = False


GGUF = GGUFNames(
    "gpt_oss",
    {name: hf for name, hf in DENSE_LAYER.items() if not name.startswith("ffn_")}
    | {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks.weight": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
    experts=True,
    keys=WINDOW_KEYS,
    adjust=_rotation,
)
_DEFAULTS = {
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "head_dim": 64,
    "sliding_window": 128,
    "num_key_value_heads": 8,
}
_ROTATION = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What transformers assumes where the config does not speak of it."""


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `GptOssConfig`.

    Raises:
        ModelError: also for weights in other blocks than MXFP4.
    """
    given = {key: value for key, value in values.items() if value is not None}
    # What GGUF files name, and what some published configs name a second time.
    given.pop("norm_topk_prob", None)
    given.pop("moe_intermediate_size", None)
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in given.items()}
    if "rope_scaling" not in values and "rope_parameters" not in renamed:
        renamed["rope_scaling"] = _ROTATION
    reader = ConfigReader(_DEFAULTS | renamed)
    reader.expect("hidden_act", "silu")
    reader.expect("attention_bias", True)
    blocks = reader.take("quantization_config", {})  # what is in blocks, the tensors say
    if blocks and (not isinstance(blocks, dict) or blocks.get("quant_method") != "mxfp4"):
        raise ModelError(f"config.json: quantization_config={blocks!r:.80} is not supported, expected mxfp4")
    reader.take("initial_context_length", 4096)  # of the rotation's scaling, which says it itself
    reader.ignore("output_router_logits", "router_aux_loss_coef", "experts_per_token")
    sizes = reader.sizes()
    moe = MoEConfig(
        num_experts=reader.integer("num_local_experts"),
        experts_per_token=reader.integer("num_experts_per_tok"),
        intermediate_size=sizes["intermediate_size"],
        router_bias=True,
        expert_biases=True,
    )
    result = ModelConfig(
        "GptOssForCausalLM",
        **sizes,
        rope=reader.rope(),
        windows=reader.layer_windows(reader.integer("sliding_window"), reader.layer_kinds(2)),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        qkv_bias=True,
        output_bias=True,
        activation="clamped",
        swiglu_limit=reader.number("swiglu_limit", 7.0),
        swiglu_slope=reader.number("swiglu_alpha", 1.702),
        sinks=True,
        moe=moe,
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result


def rules(config: ModelConfig) -> list[Rule]:
    """Names Llama's tensors, sinks, router and experts."""
    return [
        *llama_rules(config),
        Rule("layers.attn.sinks", (BLOCK + "self_attn.sinks",)),
        *expert_rules(config, "mlp.router", parts=("weight", "bias")),
    ]
