"""Tables for `from_tree`: where the models of Tunix keep what Hugging Face's files name.

Tunix (https://github.com/google/tunix, tunix/models) keeps projections as [in, heads, head] and [heads, head, in], MLPs
as [in, out] with `kernel`s, and rotates heads as Hugging Face does. A head of its own is there where it is not tied.
"""

from __future__ import annotations

from types import MappingProxyType

from llm_infer.models.import_tree import Entry, Names

_LAYER = "layers.{i}."
_BLOCK = "model.layers.{i}."


def _table(*parts: dict[str, Entry]) -> Names:
    return MappingProxyType({path: entry for part in parts for path, entry in part.items()})


_ENDS: dict[str, Entry] = {
    "embedder.input_embedding": "model.embed_tokens.weight",
    "final_norm.w": "model.norm.weight",
    "lm_head.w": ("lm_head.weight", "T"),
}
_ATTENTION: dict[str, Entry] = {
    **{
        f"{_LAYER}attn.{name}_proj.w": (f"{_BLOCK}self_attn.{name}_proj.weight", "e heads d -> (heads d) e")
        for name in "qkv"
    },
    f"{_LAYER}attn.o_proj.w": (f"{_BLOCK}self_attn.o_proj.weight", "heads d e -> e (heads d)"),
}
_MLP: dict[str, Entry] = {
    f"{_LAYER}mlp.{name}_proj.kernel": (f"{_BLOCK}mlp.{name}_proj.weight", "T") for name in ("gate", "up", "down")
}
_NORMS: dict[str, Entry] = {
    f"{_LAYER}{name}.w": f"{_BLOCK}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")
}
_HEAD_NORMS: dict[str, Entry] = {
    f"{_LAYER}attn.{name}_norm.w": f"{_BLOCK}self_attn.{name}_norm.weight" for name in "qk"
}
_BIASES: dict[str, Entry] = {f"{_LAYER}attn.{name}_bias": f"{_BLOCK}self_attn.{name}_proj.bias" for name in "qkv"}
_EXPERTS: dict[str, Entry] = {
    f"{_LAYER}mlp.router.kernel": (f"{_BLOCK}mlp.gate.weight", "T"),
    **{
        f"{_LAYER}mlp.{name}_proj": (f"{_BLOCK}mlp.experts.{{x}}.{name}_proj.weight", "T")
        for name in ("gate", "up", "down")
    },
}
_GEMMA_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn._query_norm": "self_attn.q_norm",
    "attn._key_norm": "self_attn.k_norm",
}

TUNIX_LLAMA3 = _table(_ENDS, _ATTENTION, _MLP, _NORMS)
"""tunix/models/llama3."""

TUNIX_QWEN2 = _table(_ENDS, _ATTENTION, _BIASES, _MLP, _NORMS)
"""tunix/models/qwen2."""

TUNIX_QWEN3 = _table(_ENDS, _ATTENTION, _HEAD_NORMS, _MLP, _EXPERTS, _NORMS)
"""tunix/models/qwen3, dense or with experts, whose matrices are [experts, in, out]."""

TUNIX_GEMMA3 = _table(
    {
        "embedder.input_embedding": "model.embed_tokens.weight",
        "final_norm.scale": "model.norm.weight",
        f"{_LAYER}attn.q_einsum.w": (f"{_BLOCK}self_attn.q_proj.weight", "heads e d -> (heads d) e"),
        f"{_LAYER}attn.kv_einsum.w": (f"{_BLOCK}self_attn.{{k|v}}_proj.weight", "heads e d -> (heads d) e"),
        f"{_LAYER}attn.qkv_einsum.w": (f"{_BLOCK}self_attn.{{q|k|v}}_proj.weight", "heads e d -> (heads d) e"),
        f"{_LAYER}attn.attn_vec_einsum.w": (f"{_BLOCK}self_attn.o_proj.weight", "heads d e -> e (heads d)"),
    },
    _MLP,
    {f"{_LAYER}{name}.scale": f"{_BLOCK}{source}.weight" for name, source in _GEMMA_NORMS.items()},
)
"""tunix/models/gemma3, its text model; where there are as many KV heads as heads, the three projections are one."""
