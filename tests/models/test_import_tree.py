"""Trees of Linen and NNX under Hugging Face's names: the weights and logits of the file that they were made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from einops import rearrange
from flax import linen, nnx

from llm_infer.base.errors import ModelError
from llm_infer.models.export import hf_tensors
from llm_infer.models.hf_layout import tensor_shapes
from llm_infer.models.import_tree import Names, from_tree
from llm_infer.models.load import LoadedModel
from llm_infer.models.new_weights import weights_digest, with_weights
from llm_infer.models.tree_names import TUNIX_GEMMA3, TUNIX_LLAMA3, TUNIX_QWEN2, TUNIX_QWEN3
from llm_infer.weights.orbax_reading import read_orbax
from tests.models.family_checkpoints import dense, golden, load

LINEN: Names = {
    "embed.embedding": "model.embed_tokens.weight",
    "layers_{i}.attn.q_proj.kernel": ("model.layers.{i}.self_attn.q_proj.weight", "e h d -> (h d) e"),
    "layers_{i}.attn.kv.kernel": ("model.layers.{i}.self_attn.{k|v}_proj.weight", "e h d -> (h d) e"),
    "layers_{i}.attn.out.kernel": ("model.layers.{i}.self_attn.o_proj.weight", lambda a: a.reshape(-1, a.shape[-1]).T),
    "gate.kernel": ("model.layers.{i}.mlp.gate_proj.weight", "T"),
    "up.kernel": ("model.layers.{i}.mlp.up_proj.weight", "T", 1),
    "down.kernel": ("model.layers.{i}.mlp.down_proj.weight", "T"),
    "layers_{i}.norm_{n}.scale": "model.layers.{i}.norm_{n}",
    "norm.scale": "model.norm.weight",
}
NORMS: Names = {
    "layers_{i}.norm_1.scale": "model.layers.{i}.input_layernorm.weight",
    "layers_{i}.norm_2.scale": "model.layers.{i}.post_attention_layernorm.weight",
}
NAMES: Names = {**{path: entry for path, entry in LINEN.items() if "norm_{n}" not in path}, **NORMS}


def zeroed(model: LoadedModel) -> LoadedModel:
    """The model with other weights, so that nothing is right that was not given."""
    return with_weights(model, {name: jnp.zeros_like(values) for name, values in model.params.items()})


def linen_tree(name: str) -> dict[str, Any]:
    """A Llama as a Linen module might have it, some of it stacked by a scan over layers."""
    tensors, config = dict(hf_tensors(load(name))), load(name).config
    heads, layers = (
        {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads},
        range(config.num_layers),
    )
    tree: dict[str, Any] = {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "norm": {"scale": tensors["model.norm.weight"]},
    }
    for i in layers:
        block = f"model.layers.{i}."
        q, k, v = (
            rearrange(tensors[f"{block}self_attn.{n}_proj.weight"], "(h d) e -> e h d", h=heads[n]) for n in "qkv"
        )
        out = rearrange(tensors[f"{block}self_attn.o_proj.weight"], "e (h d) -> h d e", h=heads["q"])
        tree[f"layers_{i}"] = {
            "attn": {
                "q_proj": {"kernel": linen.Partitioned(jnp.asarray(q), names=(None, None, None))},
                "kv": {"kernel": jnp.stack((k, v))},
                "out": {"kernel": out},
            },
            "norm_1": {"scale": tensors[f"{block}input_layernorm.weight"]},
            "norm_2": {"scale": tensors[f"{block}post_attention_layernorm.weight"]},
        }
    for part, axis in (("gate", 0), ("up", 1), ("down", 0)):
        kernels = [tensors[f"model.layers.{i}.mlp.{part}_proj.weight"].T for i in layers]
        tree[part] = {"kernel": np.stack(kernels, axis)}
    return {"params": tree}


def test_a_tree_of_linen() -> None:
    model = load("llama_gqa")
    found = with_weights(zeroed(model), from_tree(linen_tree("llama_gqa"), NAMES, model.config))
    assert weights_digest(found.params) == weights_digest(model.params)
    expected = golden("llama_gqa")
    logits, _ = dense(found, expected.prompts[0])
    np.testing.assert_allclose(logits, expected.logits[0], rtol=1e-3, atol=1e-3)


# What Tunix has, made of the file's tensors in the way that its loaders make it


class Holder(nnx.Module):
    """Modules and parameters by name."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        for name, value in parts.items():
            made = nnx.List([Holder(each) for each in value]) if isinstance(value, list) else value
            setattr(self, name, Holder(made) if isinstance(made, dict) else made)


def param(values: np.ndarray) -> nnx.Param:
    return nnx.Param(jnp.asarray(values))


def tunix(name: str) -> nnx.Module:
    tensors, config = dict(hf_tensors(load(name))), load(name).config
    width = config.hidden_size
    gemma = name.startswith("gemma3")
    norm = "scale" if gemma else "w"

    def scale(tensor: str) -> dict[str, Any]:
        return {norm: param(tensors[tensor])}

    def projection(block: str, which: str) -> np.ndarray:
        heads = config.num_heads if which == "q" else config.num_kv_heads
        return tensors[f"{block}self_attn.{which}_proj.weight"].transpose(1, 0).reshape(width, heads, config.head_dim)

    layers = []
    for i in range(config.num_layers):
        block = f"model.layers.{i}."
        q, k, v = (projection(block, which) for which in "qkv")
        out = tensors[f"{block}self_attn.o_proj.weight"].transpose(1, 0)
        out = {"w": param(out.reshape(config.num_heads, config.head_dim, width))}
        q_norm, k_norm = (f"{block}self_attn.{which}_norm.weight" for which in "qk")
        if gemma:
            q, k, v = (each.transpose(1, 0, 2) for each in (q, k, v))
            attn: dict[str, Any] = {"attn_vec_einsum": out, "_query_norm": scale(q_norm), "_key_norm": scale(k_norm)}
            if config.num_heads == config.num_kv_heads:
                attn["qkv_einsum"] = {"w": param(np.stack((q, k, v)))}
            else:
                attn |= {"q_einsum": {"w": param(q)}, "kv_einsum": {"w": param(np.stack((k, v)))}}
        else:
            attn = {f"{which}_proj": {"w": param(each)} for which, each in zip("qkv", (q, k, v), strict=True)}
            attn["o_proj"] = out
            if config.qk_norm:
                attn |= {"q_norm": scale(q_norm), "k_norm": scale(k_norm)}
            if config.qkv_bias:
                attn |= {f"{n}_bias": param(tensors[f"{block}self_attn.{n}_proj.bias"]) for n in "qkv"}
        mlp: dict[str, Any] = {}
        for part in ("gate", "up", "down"):
            if config.moe is None:
                mlp[f"{part}_proj"] = {"kernel": param(tensors[f"{block}mlp.{part}_proj.weight"].transpose(1, 0))}
                continue
            each = [tensors[f"{block}mlp.experts.{x}.{part}_proj.weight"] for x in range(config.moe.num_experts)]
            mlp[f"{part}_proj"] = param(np.stack([one.transpose(1, 0) for one in each]))
            mlp["router"] = {"kernel": param(tensors[f"{block}mlp.gate.weight"].transpose(1, 0))}
        names = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
        if gemma:
            names = {
                "pre_attention_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "pre_ffw_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            }
        norms = {own: scale(f"{block}{source}.weight") for own, source in names.items()}
        layers.append({"attn": attn, "mlp": mlp, **norms})
    parts: dict[str, Any] = {
        "embedder": {"input_embedding": param(tensors["model.embed_tokens.weight"])},
        "layers": layers,
        "final_norm": scale("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        parts["lm_head"] = {"w": param(tensors["lm_head.weight"].transpose(1, 0))}
    return Holder(parts)


TABLES = {
    "llama_gqa": TUNIX_LLAMA3,
    "qwen2_gqa": TUNIX_QWEN2,
    "qwen3_gqa": TUNIX_QWEN3,
    "qwen3_moe_gqa": TUNIX_QWEN3,
    "gemma3_gqa": TUNIX_GEMMA3,
    "gemma3_mha": TUNIX_GEMMA3,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_model_of_tunix(name: str, tmp_path: Path) -> None:
    model, state = load(name), nnx.state(tunix(name))
    trees = {"state": state, "pure": nnx.to_pure_dict(state)}
    if name == "qwen3_gqa":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", state)
        trees["saved"] = read_orbax(tmp_path / "saved")
    expected = dict(hf_tensors(model))
    for tree in trees.values():
        arrays = from_tree(tree, TABLES[name], model.config)
        assert arrays.keys() == expected.keys()
        for tensor, values in expected.items():
            np.testing.assert_array_equal(arrays[tensor], values, err_msg=tensor)


def test_experts_of_gpt_oss_are_alone() -> None:
    config = load("gpt_oss_gqa").config
    assert config.moe is not None
    expected = (config.moe.intermediate_size, config.hidden_size)
    assert tensor_shapes(config)["model.layers.0.mlp.experts.1.gate_proj.weight"] == expected


# Errors


def changed(**changes: Any) -> dict[str, Any]:
    tree = linen_tree("llama_gqa")["params"]
    return {**tree, **changes}


@pytest.mark.parametrize(
    ("tree", "names", "message"),
    [
        (changed(lora={"a": np.ones(2)}, x=np.ones(2)), {}, r"no entry of the table is for lora\.a .*, x .*: add entries"),
        (changed(layers_9={"attn": {"q_porj": {"kernel": np.ones(2)}}}), {}, r"the nearest entry is layers_\{i\}\.attn\.q_proj"),
        (changed(norm={"scale": np.ones(3)}), {}, r"norm\.scale \[3\] gives model\.norm\.weight \[3\], expected \[32\]"),
        (changed(), {"norm.scale": "model.norm.wieght"}, r"does not have; the nearest is model\.norm\.weight"),
        (changed(), {"layers_{i}.norm_{n}.scale": "y"}, r"is in several entries: layers_\{i\}\.norm_1.*norm_\{n\}"),
        (changed(), {"norm.scale": "model.embed_tokens.weight"}, r"gives model\.embed_tokens\.weight, which is there already"),
        (changed(), {"norm.scale": ("model.norm.weight", "a b -> b a")}, r"norm\.scale \[32\] cannot be transformed by 'a b"),
        (changed(), {"norm.scale": "model.layers.{q|k}.x"}, r"axis 0 has 32 parts for \{q\|k\}"),
        (changed(), {"norm.scale": ("model.layers.{i}.x", None, 1)}, r"\[32\] has no axis 1 along which"),
        (changed(norm={"scale": "text"}), {}, r"norm\.scale .*gives|norm\.scale is"),
        (changed(norm={"scale": {"value": np.ones(2)}, "scale.value": np.ones(2)}), {}, r"norm\.scale is there twice"),
        ({}, {}, "there are no weights"),
        ({"a": None}, {}, "there are no weights"),
    ],
)  # fmt: skip
def test_what_is_refused(tree: dict[str, Any], names: Names, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        from_tree(tree, {**NAMES, **names}, load("llama_gqa").config)
    assert len(str(caught.value)) < 700


def test_paths_that_are_no_weights() -> None:
    tree = changed(lora={"a": np.ones(2), "b": np.ones(2)}, rngs={"count": 3}, head=np.ones((128, 32), np.float32))
    names = {**NAMES, "head": "lm_head.weight"}
    arrays = from_tree(tree, names, load("llama_gqa").config, ignore=("lora.*", "rngs.count"))
    assert "lm_head.weight" in arrays  # which a tied model's file may have too
    assert not any("lora" in name for name in arrays)
    assert isinstance(arrays["model.layers.0.self_attn.k_proj.weight"], jax.Array)
    assert isinstance(arrays["model.layers.0.self_attn.o_proj.weight"], np.ndarray)
