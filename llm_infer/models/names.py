"""Weight-name rules that several families share: the attention projections and the plain matrices of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from llm_infer.models.config import ModelConfig
from llm_infer.weights.gguf_names import EXPERT
from llm_infer.weights.rules import Arrange, Rule, fuse_qkv

BLOCK = "model.layers.{layer}."
"""Prefix of a layer's tensors in Hugging Face's Llama-like models."""


def qkv_rules(
    config: ModelConfig, prefix: str = BLOCK, order: Callable[[np.ndarray], np.ndarray] | None = None
) -> list[Rule]:
    """Names the query, key and value projections (weights, and biases where there are any), fused if the config says so.

    `order` brings the rows of queries and keys into the order in which they are rotated here.
    """
    fuse = fuse_qkv(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)

    def arrange(tensors: Sequence[np.ndarray]) -> np.ndarray:
        query, key, value = tensors
        return fuse(tensors if order is None else (order(query), order(key), value))

    def alone(tensors: Sequence[np.ndarray]) -> np.ndarray:
        assert order is not None
        return order(tensors[0])

    rules = []
    for part in ("weight", "bias") if config.qkv_bias else ("weight",):
        sources = [f"{prefix}self_attn.{name}_proj.{part}" for name in "qkv"]
        if config.fused_qkv:
            rules.append(Rule(f"layers.attn.qkv.{part}", tuple(sources), arrange=arrange))
        else:
            rules += [
                Rule(f"layers.attn.{n}.{part}", (source,), arrange=None if order is None or n == "v" else alone)
                for n, source in zip("qkv", sources, strict=True)
            ]
    return rules


def one_qkv_rules(config: ModelConfig) -> list[Rule]:
    """Names the projections of a file that has queries, keys and values below each other in one matrix, fused or each alone."""
    fuse = fuse_qkv(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = {"q": (0, query), "k": (query, query + key), "v": (query + key, query + 2 * key)}

    def part(name: str) -> Arrange:
        first, end = ends[name]
        return lambda tensors: _rows(tensors[0], query + 2 * key)[first:end]

    def fused(tensors: Sequence[np.ndarray]) -> np.ndarray:
        return fuse([part(name)(tensors) for name in ends])

    tensor = (BLOCK + "self_attn.qkv_proj.weight",)
    if config.fused_qkv:
        return [Rule("layers.attn.qkv.weight", tensor, arrange=fused)]
    return [Rule(f"layers.attn.{name}.weight", tensor, arrange=part(name)) for name in ends]


def _rows(tensor: np.ndarray, count: int) -> np.ndarray:
    """Returns a tensor of so many rows; ValueError for another, as the loader expects of an arrangement."""
    if not tensor.shape or tensor.shape[0] != count:
        raise ValueError(f"{list(tensor.shape)} for {count} rows")
    return tensor


def gate_up_rules(config: ModelConfig) -> list[Rule]:
    """Names the MLP of a file that has gates and, below them, ups in one matrix."""
    inner, tensor = config.intermediate_size, (BLOCK + "mlp.gate_up_proj.weight",)
    return [
        Rule("layers.mlp.gate.weight", tensor, arrange=lambda tensors: _rows(tensors[0], 2 * inner)[:inner]),
        Rule("layers.mlp.up.weight", tensor, arrange=lambda tensors: _rows(tensors[0], 2 * inner)[inner:]),
        Rule("layers.mlp.down.weight", (BLOCK + "mlp.down_proj.weight",)),
    ]


def expert_rules(
    config: ModelConfig,
    router: str = "mlp.gate",
    matrices: Mapping[str, str] = MappingProxyType(EXPERT),
    parts: Sequence[str] = ("weight",),
) -> list[Rule]:
    """Names the router, and the experts' matrices (and biases) stacked below each other; `{x}` stands for the expert."""
    assert config.moe is not None
    experts = range(config.moe.num_experts)
    return [
        *(Rule(f"layers.mlp.router.{part}", (f"{BLOCK}{router}.{part}",)) for part in parts),
        *(
            Rule(
                f"layers.mlp.{name}.{part}",
                tuple(f"{BLOCK}{tensor}.{part}".replace("{x}", str(x)) for x in experts),
                arrange=np.concatenate,
            )
            for name, tensor in matrices.items()
            for part in parts
        ),
    ]


def shared_expert_rules(expert: str) -> list[Rule]:
    """Names the matrices of the expert that every token runs through; `expert` is its name within a layer."""
    return [Rule(f"layers.mlp.shared_{name}.weight", (f"{BLOCK}{expert}.{name}_proj.weight",)) for name in EXPERT]


LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
AFTER_NORMS = {"attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
BOTH_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"} | AFTER_NORMS
"""Norms of a layer → their names within it: before attention and MLP, after them, or both."""


def add_one(tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Arranges the scales of a norm that the file holds less one."""
    return tensors[0] + 1


def llama_rules(
    config: ModelConfig,
    norms: Mapping[str, str] = LLAMA_NORMS,
    qkv: Callable[[ModelConfig], list[Rule]] = qkv_rules,
    mlp_rules: Callable[[ModelConfig], list[Rule]] | None = None,
) -> list[Rule]:
    """Names all parameters of a model whose tensors are named as Llama's, but for the MLP of a mixture of experts.

    Args:
        config: the model.
        norms: those of a layer, see LLAMA_NORMS.
        qkv: names the query, key and value projections.
        mlp_rules: names the MLP's matrices where they are not Llama's.
    """
    mlp = [] if config.moe is not None or mlp_rules is not None else ["gate", "up", "down"]
    own = {f"attn.{n}": f"self_attn.{n}" for n in ("q_norm", "k_norm") if config.qk_norm or config.qk_norm_whole}
    scales = {f"layers.{name}.weight": f"{BLOCK}{source}.weight" for name, source in {**norms, **own}.items()}
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
        *qkv(config),
        *([] if mlp_rules is None else mlp_rules(config)),
        Rule("layers.attn.o.weight", (BLOCK + "self_attn.o_proj.weight",)),
        *(Rule(f"layers.mlp.{n}.weight", (f"{BLOCK}mlp.{n}_proj.weight",)) for n in mlp),
        *(Rule(f"layers.{n.replace('self_', '')}.bias", (f"{BLOCK}{n}_proj.bias",)) for n in biases),
        *head,
    ]


LLAMA_IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")
"""Tensors that such checkpoints carry and that no parameter needs (a tied head is often stored twice)."""
