"""Numbers of weights as formulas of a configuration: an oracle for what the modules declare."""

from __future__ import annotations

from llm_infer.models.config import ModelConfig
from llm_infer.models.families.opt import POSITION_OFFSET, OPTConfig


def num_parameters(config: ModelConfig) -> int:
    """Weights of a whole model."""
    if isinstance(config, OPTConfig):
        return _of_opt(config)
    width, head_dim = config.hidden_size, config.head_dim
    qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    attention = qkv_rows * width + config.num_heads * head_dim * width
    attention += qkv_rows * config.qkv_bias + 2 * head_dim * config.qk_norm
    attention += (config.num_heads + config.num_kv_heads) * head_dim * config.qk_norm_whole
    attention += width * config.output_bias + config.num_heads * config.sinks
    if (moe := config.moe) is None:
        inner = config.intermediate_size
        mlps = config.num_layers * (3 * inner * width + (2 * inner + width) * config.mlp_bias)
    else:
        inner = moe.intermediate_size
        mlp = moe.num_experts * (3 * inner * width + width + (2 * inner + width) * moe.expert_biases + moe.router_bias)
        mlp += moe.num_experts * moe.correction
        mlp += 3 * moe.shared_size * width + width * moe.shared_gate
        dense = moe.dense_first
        mlps = (config.num_layers - dense) * mlp + dense * 3 * config.intermediate_size * width
    conv = 4 * width * width + config.conv_taps * width + 5 * width * config.conv_bias
    mixers = len(config.layers_of("attention")) * attention + len(config.layers_of("conv")) * conv
    norms = 4 if config.norms == "both" else 2
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return embeddings + mixers + config.num_layers * norms * width + mlps + width


def _of_opt(config: OPTConfig) -> int:
    width, inner, narrow = config.hidden_size, config.intermediate_size, config.embedding_size
    attention = 4 * (width * width + width)
    mlp = 2 * inner * width + inner + width
    projections = 2 * narrow * width if narrow != width else 0
    ends = (config.vocab_size * narrow) * (1 if config.tie_word_embeddings else 2) + projections
    ends += (config.max_position_embeddings + POSITION_OFFSET) * width + 2 * width * config.pre_norm
    return ends + config.num_layers * (attention + mlp + 4 * width)
