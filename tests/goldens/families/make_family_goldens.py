"""Make the tiny checkpoints of this folder and what `transformers` computes with them (float32).

Usage: python make_family_goldens.py [NAME …]      (needs torch, transformers; see CONTRIBUTING.md)

NAME/ is a Hugging Face directory: config.json and model.safetensors with random bfloat16 weights, scaled so that every
parameter shows in the logits. NAME/golden.npz holds, for two prompts: ids, greedy tokens with their top-two margins,
the logits of all prompt tokens, and of the first prompt the output of every layer.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

STEPS = 12
PROMPT_LENGTHS = (21, 9)  # no multiples of a page or of a chunk
COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
GQA = {"num_attention_heads": 8, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN_EXPERTS = {
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
OPT = {"num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
OPT |= {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}

MODELS = {
    "llama_mha": (LlamaForCausalLM, LlamaConfig(**COMMON, **MHA, intermediate_size=64)),
    "llama_gqa": (
        LlamaForCausalLM,
        LlamaConfig(
            **{**COMMON, **GQA, "num_hidden_layers": 3},
            intermediate_size=64,
            tie_word_embeddings=True,
            rope_parameters=LLAMA3_ROPE,
        ),
    ),
    "qwen2_mha": (Qwen2ForCausalLM, Qwen2Config(**COMMON, **MHA, intermediate_size=64)),
    "qwen2_gqa": (Qwen2ForCausalLM, Qwen2Config(**COMMON, **GQA, intermediate_size=64, tie_word_embeddings=True)),
    # The head size, 16, is neither 32 / 4 nor 32 / 8.
    "qwen3_mha": (Qwen3ForCausalLM, Qwen3Config(**COMMON, **MHA, head_dim=16, intermediate_size=64)),
    "qwen3_gqa": (
        Qwen3ForCausalLM,
        Qwen3Config(**COMMON, **GQA, head_dim=16, intermediate_size=64, tie_word_embeddings=True),
    ),
    # Windows in the later layers, and in every other one; shorter than a page, than a chunk and than the prompts.
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **{**COMMON, **MHA, "num_hidden_layers": 3},
            intermediate_size=64,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    "qwen3_window": (
        Qwen3ForCausalLM,
        Qwen3Config(
            **{**COMMON, **GQA, "num_hidden_layers": 4},
            head_dim=16,
            intermediate_size=64,
            use_sliding_window=True,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "qwen3_moe_mha": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **COMMON,
            **MHA,
            head_dim=16,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=False,
        ),
    ),
    "qwen3_moe_gqa": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **COMMON,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=64,
            moe_intermediate_size=8,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
        ),
    ),
    "opt_pre": (OPTForCausalLM, OPTConfig(**OPT, word_embed_proj_dim=32)),
    # As the 350m size: narrow embeddings and norms after the residual sums.
    "opt_post": (OPTForCausalLM, OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    # Layers of both kinds, in the pattern of the family; windows shorter than a page, than a chunk and than the prompts.
    "gemma3_mha": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **{**COMMON, **MHA, "num_hidden_layers": 6},
            head_dim=16,
            intermediate_size=64,
            query_pre_attn_scalar=12,
            sliding_window=5,
        ),
    ),
    "gemma3_gqa": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **{**COMMON, **GQA, "num_hidden_layers": 3},
            head_dim=8,
            intermediate_size=64,
            query_pre_attn_scalar=8,
            sliding_window=7,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            final_logit_softcapping=9.0,
        ),
    ),
    "gemma2_mha": (
        Gemma2ForCausalLM,
        Gemma2Config(**COMMON, **MHA, head_dim=16, intermediate_size=64, query_pre_attn_scalar=12, sliding_window=5),
    ),
    "gemma2_gqa": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **{**COMMON, **GQA, "num_hidden_layers": 3},
            head_dim=8,
            intermediate_size=64,
            query_pre_attn_scalar=8,
            sliding_window=9,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=20.0,
        ),
    ),
    "gpt_oss_mha": (
        GptOssForCausalLM,
        GptOssConfig(
            **COMMON,
            **MHA,
            head_dim=16,
            intermediate_size=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=5,
            rope_parameters={**YARN, "truncate": False},
        ),
    ),
    "gpt_oss_gqa": (
        GptOssForCausalLM,
        GptOssConfig(
            **{**COMMON, **GQA, "num_hidden_layers": 3},
            head_dim=8,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=3,
            sliding_window=7,
            rope_parameters={**YARN},
            swiglu_limit=1.5,
        ),
    ),
    "mistral_mha": (MistralForCausalLM, MistralConfig(**COMMON, **MHA, intermediate_size=64, sliding_window=6)),
    "mistral_gqa": (
        MistralForCausalLM,
        MistralConfig(
            **COMMON, **GQA, head_dim=16, intermediate_size=64, sliding_window=None, rope_parameters={**YARN}
        ),
    ),
    "smollm3_mha": (
        SmolLM3ForCausalLM,
        SmolLM3Config(
            **{**COMMON, **MHA, "num_hidden_layers": 4},
            intermediate_size=64,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "smollm3_gqa": (
        SmolLM3ForCausalLM,
        SmolLM3Config(**{**COMMON, **GQA, "num_hidden_layers": 3}, intermediate_size=64, no_rope_layers=[1, 0, 1]),
    ),
    "granite_mha": (
        GraniteForCausalLM,
        GraniteConfig(
            **COMMON,
            **MHA,
            intermediate_size=64,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
            logits_scaling=2.0,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "granite_gqa": (
        GraniteForCausalLM,
        GraniteConfig(
            **COMMON,
            **GQA,
            intermediate_size=64,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.5,
            logits_scaling=0.5,
            tie_word_embeddings=True,
        ),
    ),
    "olmo2_mha": (Olmo2ForCausalLM, Olmo2Config(**COMMON, **MHA, intermediate_size=64)),
    "olmo2_gqa": (
        Olmo2ForCausalLM,
        Olmo2Config(**{**COMMON, **GQA, "num_hidden_layers": 3}, intermediate_size=64, tie_word_embeddings=True),
    ),
    "olmo3_mha": (
        Olmo3ForCausalLM,
        Olmo3Config(**{**COMMON, **MHA, "num_hidden_layers": 4}, intermediate_size=64, sliding_window=5),
    ),
    "olmo3_gqa": (
        Olmo3ForCausalLM,
        Olmo3Config(
            **{**COMMON, **GQA, "num_hidden_layers": 3},
            intermediate_size=64,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {**YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
    ),
    "mixtral_mha": (MixtralForCausalLM, MixtralConfig(**COMMON, **MHA, intermediate_size=16, sliding_window=6)),
    "mixtral_gqa": (
        MixtralForCausalLM,
        MixtralConfig(**COMMON, **GQA, head_dim=16, intermediate_size=32, num_local_experts=4, num_experts_per_tok=3),
    ),
    "qwen2_moe_mha": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**COMMON, **MHA, **QWEN_EXPERTS)),
    "qwen2_moe_gqa": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(**COMMON, **GQA, **QWEN_EXPERTS, norm_topk_prob=True, tie_word_embeddings=True),
    ),
    "phi3_mha": (
        Phi3ForCausalLM,
        Phi3Config(**{**COMMON, "pad_token_id": 0}, **MHA, intermediate_size=64, sliding_window=7),
    ),
    "phi3_gqa": (
        Phi3ForCausalLM,
        Phi3Config(
            **{**COMMON, **GQA, "hidden_size": 64, "pad_token_id": 0},
            intermediate_size=64,
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
        ),
    ),
    "glm4_mha": (
        Glm4ForCausalLM,
        Glm4Config(**{**COMMON, "pad_token_id": 0}, **MHA, head_dim=16, intermediate_size=64, attention_bias=False),
    ),
    "glm4_gqa": (
        Glm4ForCausalLM,
        Glm4Config(
            **{**COMMON, **GQA, "num_hidden_layers": 3, "pad_token_id": 0},
            head_dim=16,
            intermediate_size=64,
            partial_rotary_factor=0.25,
        ),
    ),
    # Both prompts are longer than the original context, so that transformers takes the long factors from the first step on.
    "phi3_longrope": (
        Phi3ForCausalLM,
        Phi3Config(
            **{**COMMON, **GQA, "hidden_size": 64, "pad_token_id": 0},
            intermediate_size=64,
            original_max_position_embeddings=8,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.5],
                "long_factor": [1.0, 2.5, 7.0],
                "original_max_position_embeddings": 8,
            },
        ),
    ),
    "minimax_m2_mha": (
        MiniMaxM2ForCausalLM,
        MiniMaxM2Config(
            **COMMON, **MHA, head_dim=16, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2, rotary_dim=8
        ),
    ),
    "minimax_m2_gqa": (
        MiniMaxM2ForCausalLM,
        MiniMaxM2Config(**COMMON, **GQA, head_dim=8, intermediate_size=32, num_local_experts=16, num_experts_per_tok=4),
    ),
    # The second in groups of experts, with two dense layers and biases, as the largest size.
    "glm4_moe_mha": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **{**COMMON, **MHA, "num_hidden_layers": 3},
            head_dim=16,
            intermediate_size=48,
            moe_intermediate_size=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
        ),
    ),
    "glm4_moe_gqa": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **{**COMMON, **GQA, "num_hidden_layers": 4},
            head_dim=8,
            intermediate_size=64,
            moe_intermediate_size=16,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=2,
            first_k_dense_replace=2,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            use_qk_norm=True,
            attention_bias=True,
        ),
    ),
    # Positions behind several times the original context, where queries grow.
    "ministral3_mha": (
        Ministral3ForCausalLM,
        Ministral3Config(
            **COMMON,
            **MHA,
            head_dim=16,
            intermediate_size=64,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4},
        ),
    ),
    "ministral3_gqa": (
        Ministral3ForCausalLM,
        Ministral3Config(
            **COMMON,
            **GQA,
            head_dim=8,
            intermediate_size=64,
            sliding_window=7,
            tie_word_embeddings=True,
            rope_parameters={**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1},
        ),
    ),
    # Kinds of layers that repeat in threes and in twos, and that do not, with biases.
    "lfm2_gqa": (
        Lfm2ForCausalLM,
        Lfm2Config(
            **{**COMMON, **GQA, "num_hidden_layers": 9},
            intermediate_size=96,
            block_multiple_of=16,
            layer_types=[*("conv", "conv", "full_attention") * 2, *("conv", "full_attention"), "conv"],
        ),
    ),
    "lfm2_mha": (
        Lfm2ForCausalLM,
        Lfm2Config(
            **{**COMMON, **MHA, "num_hidden_layers": 3},
            block_ff_dim=48,
            block_auto_adjust_ff_dim=False,
            conv_L_cache=4,
            conv_bias=True,
            full_attn_idxs=[1],
            tie_embedding=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
    ),
    "lfm2_moe_gqa": (
        Lfm2MoeForCausalLM,
        Lfm2MoeConfig(
            **{**COMMON, **GQA, "num_hidden_layers": 6},
            intermediate_size=64,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=3,
            num_dense_layers=2,
            layer_types=["conv", *("conv", "full_attention") * 2, "conv"],
        ),
    ),
    "lfm2_moe_mha": (
        Lfm2MoeForCausalLM,
        Lfm2MoeConfig(
            **{**COMMON, **MHA, "num_hidden_layers": 3},
            intermediate_size=48,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            num_dense_layers=1,
            use_expert_bias=False,
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
            conv_L_cache=4,
            conv_bias=True,
            layer_types=["conv", "full_attention", "conv"],
            tie_embedding=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
    ),
}


def fill(model: torch.nn.Module, seed: int) -> None:
    """Random parameters that bfloat16 holds exactly: norms around one, matrices that keep the size of their input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values = 0.3 * noise
        elif parameter.ndim == 1:
            values = 1 + 0.3 * noise
        elif "embed" in name:
            values = 0.7 * noise
        else:
            values = noise * parameter.shape[-1] ** -0.5
        parameter.data = values.to(torch.bfloat16).float()
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias")):
            buffer.copy_((0.3 * torch.randn(buffer.shape, generator=generator)).to(torch.bfloat16).float())


def compute(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Everything that golden.npz holds."""
    rng = np.random.default_rng(seed)
    base = model.model.decoder if hasattr(model.model, "decoder") else model.model
    hidden: list[np.ndarray] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: hidden.append((out[0] if isinstance(out, tuple) else out)[0].numpy().copy())
        )
        for layer in base.layers
    ]
    arrays: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for index, length in enumerate(PROMPT_LENGTHS):
            ids = rng.integers(3, model.config.vocab_size, length).tolist()
            arrays[f"prompt_{index}"] = np.array(ids, np.int32)
            arrays[f"logits_{index}"] = model(torch.tensor([ids])).logits[0].numpy()
            if index == 0:
                arrays["hidden"] = np.stack(hidden)
                for hook in hooks:
                    hook.remove()
            tokens, margins = [], []
            for _ in range(STEPS):
                scores = model(torch.tensor([ids + tokens])).logits[0, -1]
                top = torch.topk(scores, 2)
                tokens.append(int(top.indices[0]))
                margins.append(float(top.values[0] - top.values[1]))
            arrays[f"tokens_{index}"] = np.array(tokens, np.int32)
            arrays[f"margins_{index}"] = np.array(margins, np.float32)
    return arrays


def main() -> None:
    here = Path(__file__).parent
    for seed, (name, (model_class, config)) in enumerate(MODELS.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        # The first random model whose greedy choices are clear, so that no rounding decides a token.
        for attempt in range(seed, seed + 1000, 100):
            fill(model, attempt)
            arrays = compute(model, attempt)
            margin = min(arrays["margins_0"].min(), arrays["margins_1"].min())
            if margin > 0.01:
                break
        folder = here / name
        shutil.rmtree(folder, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "golden.npz", **arrays)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size / 1e3:.0f} kB, smallest margin {margin:.4f}")


if __name__ == "__main__":
    main()
