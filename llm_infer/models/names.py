"""Weight-name rules that several families share: the attention projections and the plain matrices of a layer."""

from __future__ import annotations

from llm_infer.models.config import ModelConfig
from llm_infer.weights.rules import Rule, fuse_qkv

BLOCK = "model.layers.{layer}."
"""Prefix of a layer's tensors in Hugging Face's Llama-like models."""


def qkv_rules(config: ModelConfig, prefix: str = BLOCK) -> list[Rule]:
    """Names the query, key and value projections (weights, and biases where there are any), fused if the config says so."""
    arrange = fuse_qkv(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    rules = []
    for part in ("weight", "bias") if config.qkv_bias else ("weight",):
        sources = [f"{prefix}self_attn.{name}_proj.{part}" for name in "qkv"]
        if config.fused_qkv:
            rules.append(Rule(f"layers.attn.qkv.{part}", tuple(sources), arrange=arrange))
        else:
            rules += [Rule(f"layers.attn.{n}.{part}", (source,)) for n, source in zip("qkv", sources, strict=True)]
    return rules


def llama_rules(config: ModelConfig) -> list[Rule]:
    """Names all parameters of a model whose tensors are named as Llama's, but for the MLP of a mixture of experts."""
    mlp = [] if config.moe is not None else ["gate", "up", "down"]
    norms = ["q_norm", "k_norm"] if config.qk_norm else []
    head = [] if config.tie_word_embeddings else [Rule("head.weight", ("lm_head.weight",))]
    return [
        Rule("embed.weight", ("model.embed_tokens.weight",)),
        Rule("layers.attn_norm.weight", (BLOCK + "input_layernorm.weight",)),
        *qkv_rules(config),
        *(Rule(f"layers.attn.{n}.weight", (f"{BLOCK}self_attn.{n}.weight",)) for n in norms),
        Rule("layers.attn.o.weight", (BLOCK + "self_attn.o_proj.weight",)),
        Rule("layers.mlp_norm.weight", (BLOCK + "post_attention_layernorm.weight",)),
        *(Rule(f"layers.mlp.{n}.weight", (f"{BLOCK}mlp.{n}_proj.weight",)) for n in mlp),
        Rule("final_norm.weight", ("model.norm.weight",)),
        *head,
    ]


LLAMA_IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")
"""Tensors that such checkpoints carry and that no parameter needs (a tied head is often stored twice)."""
