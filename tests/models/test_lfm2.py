"""Models of layers of two kinds: the loop over them, what each kind is told, and how LFM2's configs and files say it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_infer.base.errors import ModelError
from llm_infer.config import ParallelConfig
from llm_infer.models.architectures import architecture_config
from llm_infer.models.config import ModelConfig
from llm_infer.models.layer_runs import layer_runs
from llm_infer.models.load import dummy_model, load_model
from llm_infer.models.opened import gguf_model, open_model
from llm_infer.models.params import merge_model
from llm_infer.models.registry import family
from llm_infer.models.sharded import why_not
from llm_infer.weights.gguf import GGUFFile
from llm_infer.weights.sources import read_json, resolve
from tests.models.family_checkpoints import FOLDER, DenseAttend, golden, load
from tests.models.test_family_gguf import write_gguf


class Counting(DenseAttend):
    """Notes in the cache [2, layers] which layer was computed when: of those that attend, and of the convolutions."""

    def __call__(self, query: Any, key: Any, value: Any, cache: Any, layer: Any, **options: Any) -> tuple:  # type: ignore[override]
        out, _ = super().__call__(query, key, value, None, layer, **options)
        return out, _noted(cache, 0, layer)

    def causal_conv(self, inputs: Any, taps: Any, cache: Any, layer: Any, /) -> tuple:
        out, _ = super().causal_conv(inputs, taps, None, layer)
        return out, _noted(cache, 1, layer)


def _noted(cache: jax.Array, row: int, layer: Any) -> jax.Array:
    return cache.at[row, layer].set(10 * cache[row, layer] + jnp.max(cache) + 1)


@pytest.mark.parametrize("loop", [1, 4, "unroll"])
@pytest.mark.parametrize(
    ("name", "fused_qkv"),
    [("lfm2_gqa", True), ("lfm2_gqa", False), ("lfm2_mha", True), ("lfm2_moe_gqa", True), ("lfm2_moe_mha", False)],
)
def test_every_loop_computes_each_layer_in_order(name: str, fused_qkv: bool, loop: Any) -> None:
    model, expected = load(name, fused_qkv=fused_qkv), golden(name)
    ids = jnp.asarray(expected.prompts[0], jnp.int32)
    layers = model.config.num_layers

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        decoder = merge_model(model.definition, params)
        positions = jnp.arange(len(ids), dtype=jnp.int32)
        hidden, order = decoder(ids, positions, jnp.zeros((2, layers), jnp.int32), Counting(), loop=loop)
        return decoder.logits(hidden), order

    logits, order = run(model.params)
    np.testing.assert_allclose(logits, expected.logits[0], atol=1e-4, rtol=0)
    for row, mixer in zip(order.tolist(), ("attention", "conv"), strict=True):
        own = [layer + 1 for layer in model.config.layers_of(mixer)]
        assert row == own + [0] * (layers - len(own))


def runs_of(config: ModelConfig) -> list[tuple[int, int, int]]:
    return [(run.start, run.period, run.repetitions) for run in layer_runs(config)]


def test_runs_of_layers() -> None:
    assert runs_of(architecture_config("lfm2-1.2b")) == [(0, 3, 3), (9, 2, 3), (15, 1, 1)]
    assert runs_of(architecture_config("lfm2-2.6b")) == [(0, 3, 2), (6, 4, 4), (22, 3, 2), (28, 1, 2)]
    assert runs_of(architecture_config("lfm2-8b-a1b")) == [(0, 1, 2), (2, 4, 4), (18, 3, 2)]
    assert runs_of(architecture_config("llama-3.2-1b")) == [(0, 1, 16)]
    assert runs_of(load("glm4_moe_gqa").config) == [(0, 1, 2), (2, 1, 2)]
    assert runs_of(load("glm4_moe_mha").config) == [(0, 1, 1), (1, 1, 2)]
    for name in ("lfm2-1.2b", "lfm2-2.6b", "lfm2-8b-a1b"):
        config = architecture_config(name)
        found = sorted(layer for run in layer_runs(config) for turn in range(run.period) for layer in run.turn(turn))
        assert found == list(range(config.num_layers))


def config_of(name: str, change: dict[str, Any], without: tuple[str, ...] = ()) -> ModelConfig:
    values = {key: value for key, value in read_json(FOLDER / name / "config.json").items() if key not in without}
    return family(values).config(values | change)


def test_the_first_configs_say_the_same() -> None:
    plain = config_of("lfm2_mha", {})
    first = {
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_mlp_init_scale": 1.0,
        "block_norm_eps": 1e-5,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "conv_dim": 32,
        "conv_dim_out": 32,
        "conv_use_xavier_init": True,
        "full_attn_idxs": [1],
        "num_heads": 4,
        "rope_theta": 500.0,
        "theta": 1e6,
        "use_pos_enc": True,
        "tie_embedding": False,
    }
    newer = ("layer_types", "intermediate_size", "rope_parameters", "tie_word_embeddings")
    assert config_of("lfm2_mha", first, newer) == plain
    assert config_of("lfm2_mha", {"intermediate_size": 7} | first, newer[:1]) == plain  # as transformers decides
    rope = config_of("lfm2_mha", {}, ("rope_parameters",)).rope
    assert rope is not None and rope.theta == 1e6
    assert config_of("lfm2_mha", {}, ("layer_types", "full_attn_idxs")).recurrent is False


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({"intermediate_size": 12288, "block_multiple_of": 256}, 8192),
        ({"intermediate_size": 6656, "block_multiple_of": 256}, 4608),
        ({"intermediate_size": 96, "block_ffn_dim_multiplier": 1.3}, 96),
        ({"intermediate_size": 96, "block_auto_adjust_ff_dim": False}, 96),
    ],
)
def test_the_size_of_the_mlp(change: dict[str, Any], size: int) -> None:
    assert config_of("lfm2_gqa", change).intermediate_size == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["conv"] * 3}, "no layer attends"),
        ({"layer_types": ["conv", "mamba", "conv"]}, "layer_types has 'mamba'"),
        ({"layer_types": ["conv"]}, "layer_types has 1 entries"),
        ({"layer_types": None, "full_attn_idxs": [3]}, r"full_attn_idxs=\[3\], expected numbers of the 3 layers"),
        ({"layer_types": None, "full_attn_idxs": [True]}, "full_attn_idxs"),
        ({"conv_L_cache": 1}, "conv_L_cache=1: expected at least 2"),
        ({"conv_dim": 16}, "conv_dim=16 is not supported"),
        ({"use_pos_enc": False}, "use_pos_enc=False is not supported"),
        ({"norm_eps": 0}, "norm_eps=0, expected a finite positive number"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_of("lfm2_mha", change)


def test_what_configs_with_experts_leave_out() -> None:
    plain = config_of("lfm2_moe_mha", {})
    older = {"tie_embedding": False, "rope_theta": 500.0, "tie_word_embeddings": True, "use_pos_enc": None}
    assert config_of("lfm2_moe_mha", older, ("rope_parameters",)) == plain
    without = ("num_dense_layers", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "use_expert_bias")
    without += ("norm_topk_prob", "routed_scaling_factor", "intermediate_size")
    moe = config_of("lfm2_moe_mha", {}, without).moe
    assert moe == architecture_config("lfm2-8b-a1b").moe
    assert config_of("lfm2_moe_mha", {"num_dense_layers": 0}).dense_first == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["conv"] * 3}, "no layer attends"),
        ({"layer_types": None}, "config.json has no 'layer_types'"),
        ({"layer_types": ["conv", "mamba", "conv"]}, "layer_types has 'mamba'"),
        ({"num_dense_layers": 4}, r"=4 is more than num_hidden_layers=3 \(num_dense_layers in some configs\)"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
        ({"expert_gating_func": 1}, "expert_gating_func=1 is not supported"),
        ({"full_attn_idxs": [1]}, "does not know: full_attn_idxs"),
    ],
)
def test_configs_with_experts_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_of("lfm2_moe_mha", change)


def test_experts_in_every_layer() -> None:
    """A model without dense layers has no parameters for them."""
    config = config_of("lfm2_moe_gqa", {"num_dense_layers": 0})
    params = {rule.param for rule in family({"architectures": [config.architecture]}).rules(config)}
    assert not any("dense_mlp" in param for param in params) and "layers.mlp.correction" in params
    assert params == dummy_model(config).params.keys()


def test_windows_beside_convolutions_are_refused() -> None:
    with pytest.raises(ModelError, match="windows beside layers with convolutions"):
        replace(load("lfm2_mha").config, windows=(4, None, None))


def test_channels_must_divide() -> None:
    config = replace(load("lfm2_mha").config, hidden_size=38)
    assert why_not(load("lfm2_mha").config, ParallelConfig(tensor_parallel_size=4)) is None
    reason = why_not(config, ParallelConfig(tensor_parallel_size=4))
    assert reason is not None and "hidden_size=38, the channels of convolutions, does not divide by 4" in reason


def test_what_attends_must_convolve() -> None:
    model = load("lfm2_mha")
    decoder, ids = merge_model(model.definition, model.params), jnp.arange(3, dtype=jnp.int32)
    with pytest.raises(TypeError, match="must have a causal_conv"):
        decoder(ids, ids, None, lambda query, key, value, cache, layer, **options: (query, cache))


def changed(tmp_path: Path, tensor: str, values: np.ndarray) -> Path:
    (tmp_path / "config.json").write_bytes((FOLDER / "lfm2_mha" / "config.json").read_bytes())
    save_file(load_file(FOLDER / "lfm2_mha" / "model.safetensors") | {tensor: values}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [("conv.in_proj.weight", (95, 32)), ("conv.conv.weight", (32, 1, 3)), ("conv.out_proj.weight", (32, 31))],
)
def test_misshapen_convolutions(tmp_path: Path, tensor: str, shape: tuple[int, ...]) -> None:
    path = changed(tmp_path, f"model.layers.0.{tensor}", np.zeros(shape, np.float32))
    with pytest.raises(ModelError, match=rf"wrong shape \(\d\): .*model.layers.0.{tensor}"):
        load_model(open_model(resolve(str(path))))


def test_convolutions_of_a_layer_that_attends_are_surplus(tmp_path: Path) -> None:
    path = changed(tmp_path, "model.layers.1.conv.conv.weight", np.zeros((32, 1, 4), np.float32))
    with pytest.raises(ModelError, match=r"surplus \(1\): model.layers.1.conv.conv.weight"):
        load_model(open_model(resolve(str(path))))


def test_kv_heads_of_gguf_layers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "lfm2_gqa", "lfm2")
    file, key = GGUFFile(tmp_path / "model.gguf"), "lfm2.attention.head_count_kv"
    plain = gguf_model(file)[0]
    assert plain["layer_types"] == read_json(FOLDER / "lfm2_gqa" / "config.json")["layer_types"]
    for wrong in (np.array([0, 2] + [0] * 6 + [4]), np.zeros(9, np.int32), np.full(8, 2, np.int32)):
        file.metadata[key] = wrong
        with pytest.raises(ModelError, match=r"lfm2\.attention\.head_count_kv"):
            gguf_model(file)
    file.metadata[key] = 2
    assert gguf_model(file)[0]["layer_types"] == ["full_attention"] * 9
