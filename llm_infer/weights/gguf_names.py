"""What llama.cpp's converter makes of one architecture: names of tensors and metadata keys, and how rows are arranged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DENSE_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MOE_LAYER = {name: hf for name, hf in DENSE_LAYER.items() if not hf.startswith("mlp.")} | {"ffn_gate_inp": "mlp.gate"}
"""With a router in place of the MLP; how experts are stacked, all architectures have in common."""
EXPERT = {name: f"mlp.experts.{{x}}.{name}_proj" for name in ("gate", "up", "down")}
"""An expert's matrices → their names within a layer, `{x}` for its number."""
SIGMOID = 2
"""The value of `expert_gating_func` for scores by a sigmoid."""
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
BIASES = ATTENTION_BIAS | {"mlp_bias": "blk.0.ffn_gate.bias"}
OUT_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
"""Norms after attention and MLP."""
WINDOW_KEYS = {"attention.sliding_window": "sliding_window"}


def shared_expert_layer(expert: str) -> dict[str, str]:
    """Names the matrices of the expert of all tokens, which lies at `expert` within a layer."""
    return {f"ffn_{name}_shexp": f"{expert}.{name}_proj" for name in EXPERT}


@dataclass(frozen=True)
class GGUFNames:
    """One architecture of GGUF files, and how llama.cpp's converter renames and rearranges it.

    Attributes:
        model_type: Hugging Face's name for it.
        layer_names: name within `blk.N.` → name within `model.layers.N.`, both without `.weight` or `.bias`, or the first with it
            where the second has none.
        global_names: the same for tensors outside the layers.
        interleaved_rope: whether rows of the query and key projections were reordered from (half, pair) to (pair, half) within
            each head, because llama.cpp rotates neighbouring elements for this architecture.
        norms_with_one: whether the scales of norms have the one added that Hugging Face's lack.
        flags: keys of the Hugging Face config that are true where the file has a tensor → that tensor.
        experts: whether the MLP is a mixture of experts, whose matrices the file holds stacked in one tensor per layer.
        expert_names: see EXPERT.
        partial_rotary: whether a part of each head may be rotated.
        convolutions: whether layers without KV heads have a short convolution in place of attention.
        keys: further metadata keys, below "<architecture>.", → keys of the Hugging Face config that hold the same number.
        values: keys of the Hugging Face config that the file does not say.
        adjust: changes the finished config, for what a table cannot say.
    """

    model_type: str
    layer_names: Mapping[str, str] = field(default_factory=lambda: DENSE_LAYER)
    global_names: Mapping[str, str] = field(
        default_factory=lambda: {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
        }
    )
    interleaved_rope: bool = False
    norms_with_one: bool = False
    flags: Mapping[str, str] = field(default_factory=dict)
    experts: bool = False
    expert_names: Mapping[str, str] = field(default_factory=lambda: EXPERT)
    partial_rotary: bool = False
    convolutions: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    adjust: Callable[[dict[str, Any]], None] | None = None
