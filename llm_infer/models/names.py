"""Weight-name rules that several families share: the attention projections and the plain matrices of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

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


LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
AFTER_NORMS = {"attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
BOTH_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"} | AFTER_NORMS
"""Norms of a layer → their names within it: before attention and MLP, after them, or both."""


def add_one(tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Arranges the scales of a norm that the file holds less one."""
    return tensors[0] + 1


def llama_rules(config: ModelConfig, norms: Mapping[str, str] = LLAMA_NORMS) -> list[Rule]:
    """Names all parameters of a model whose tensors are named as Llama's, but for the MLP of a mixture of experts.

    `norms` are those of a layer, see LLAMA_NORMS.
    """
    mlp = [] if config.moe is not None else ["gate", "up", "down"]
    own = {f"attn.{n}": f"self_attn.{n}" for n in ("q_norm", "k_norm") if config.qk_norm or config.qk_norm_whole}
    scales = {f"layers.{name}.weight": f"{BLOCK}{source}.weight" for name, source in (norms | own).items()}
    scales["final_norm.weight"] = "model.norm.weight"
    head = [] if config.tie_word_embeddings else [Rule("head.weight", ("lm_head.weight",))]
    biases = ["self_attn.o"] if config.output_bias else []
    biases += [f"mlp.{n}" for n in mlp] if config.mlp_bias else []
    return [
        Rule("embed.weight", ("model.embed_tokens.weight",)),
        *(
            Rule(name, (tensor,), arrange=add_one if config.add_one_to_norms else None)
            for name, tensor in scales.items()
        ),
        *qkv_rules(config),
        Rule("layers.attn.o.weight", (BLOCK + "self_attn.o_proj.weight",)),
        *(Rule(f"layers.mlp.{n}.weight", (f"{BLOCK}mlp.{n}_proj.weight",)) for n in mlp),
        *(Rule(f"layers.{n.replace('self_', '')}.bias", (f"{BLOCK}{n}_proj.bias",)) for n in biases),
        *head,
    ]


LLAMA_IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")
"""Tensors that such checkpoints carry and that no parameter needs (a tied head is often stored twice)."""
