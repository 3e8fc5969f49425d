"""OPT (Zhang et al., 2022): its config keys and weight names. What it computes is in opt_decoder.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import qkv_rules
from llm_infer.weights.rules import Rule

POSITION_OFFSET = 2
"""Row of position 0 in the table of positions; the rows before it are left over from fairseq's padding."""

IGNORED_TENSORS = (r"lm_head\.weight", r"(model\.)?decoder\.version")


@dataclass(frozen=True, slots=True)
class OPTConfig(ModelConfig):
    """An OPT model.

    Attributes:
        pre_norm: norms come before attention and MLP, and one after the last layer; otherwise (350m) after each
            residual sum, and none at the end.
        embedding_size: width of the embeddings; where it is not E (350m), projections lead in and out.
    """

    pre_norm: bool = True
    embedding_size: int = 0


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> OPTConfig:
    """Makes the model configuration of a Hugging Face `OPTConfig`."""
    reader = ConfigReader(values)
    heads, width = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    reader.expect("activation_function", "relu")
    reader.expect("enable_bias", True)
    reader.expect("layer_norm_elementwise_affine", True)
    reader.expect("_remove_final_layer_norm", False)
    for training in ("activation_dropout", "dropout", "init_std", "layerdrop"):
        reader.take(training, 0.0)
    reader.take("prefix", "")  # what its tokenizer puts first
    result = OPTConfig(
        architecture="OPTForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=width,
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(1, width // heads),
        intermediate_size=reader.integer("ffn_dim"),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        norm_eps=1e-5,
        rope=None,
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        qkv_bias=True,
        fused_qkv=fused_qkv,
        pre_norm=reader.flag("do_layer_norm_before", True),
        embedding_size=reader.integer("word_embed_proj_dim", width),
    )
    reader.finish()
    return result


def rules(config: OPTConfig) -> list[Rule]:
    """Says where each parameter comes from, by Hugging Face tensor name."""
    decoder, block = "model.decoder.", "model.decoder.layers.{layer}."
    layer = {
        "attn_norm": "self_attn_layer_norm",
        "attn.o": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    }
    projections = ("project_in", "project_out") if config.embedding_size != config.hidden_size else ()
    return [
        Rule("embed.weight", (decoder + "embed_tokens.weight",)),
        Rule("positions.weight", (decoder + "embed_positions.weight",)),
        *(Rule(f"{name}.weight", (f"{decoder}{name}.weight",)) for name in projections),
        *qkv_rules(config, block),
        *(
            Rule(f"layers.{name}.{part}", (f"{block}{source}.{part}",))
            for name, source in layer.items()
            for part in ("weight", "bias")
        ),
        *(
            Rule(f"final_norm.{part}", (f"{decoder}final_layer_norm.{part}",))
            for part in ("weight", "bias")
            if config.pre_norm
        ),
        *([] if config.tie_word_embeddings else [Rule("head.weight", ("lm_head.weight",))]),
    ]
