"""Gradients of the model: those of a dense model in plain XLA, whatever the weights' form, and of packed rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.functional import token_logprobs
from llm_infer.models.layer_runs import layer_kinds
from llm_infer.models.load import LoadedModel, load_model
from llm_infer.models.opened import open_model
from llm_infer.models.params import Params, merge_model
from llm_infer.quant import StoredWeights
from llm_infer.weights.sources import resolve
from pallas_kernels.quant_matmul import dequantise, untile
from tests.models.block_files import write_llama
from tests.models.family_checkpoints import NAMES, DenseAttend, golden, load

SOME = ("gpt_oss_gqa",)


def plain_logprobs(model: LoadedModel, params: Params, prompt: list[int]) -> jax.Array:
    """The log-probabilities of a prompt's tokens by XLA alone: layers from a stack, whole matrices of scores."""
    decoder, ids = merge_model(model.definition, params), jnp.asarray(prompt, jnp.int32)
    if model.config.moe is not None:
        decoder.layers.mlp.counted = True
    positions = jnp.arange(len(ids), dtype=jnp.int32)
    x, angles = decoder.embed_tokens(ids, positions), decoder.angles(positions)
    for layer, kind in enumerate(layer_kinds(model.config)):
        x, _ = decoder.layers(x, angles, None, jnp.int32(layer), DenseAttend(), **kind.options)
    found = jax.nn.log_softmax(decoder.logits(x))[:-1]
    return jnp.take_along_axis(found, ids[1:, None], axis=1).sum()


def assert_close(found: jax.Array, expected: jax.Array, name: str) -> None:
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(scale, 1e-3), err_msg=name)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME else pytest.mark.sweep) for n in NAMES])
def test_gradients_are_those_of_plain_xla(name: str) -> None:
    model, prompt = load(name), golden(name).prompts[0]
    expected = jax.jit(jax.grad(lambda params: plain_logprobs(model, params, prompt)))(model.params)
    ids = np.array([prompt], np.int32)
    ours = jax.jit(jax.grad(lambda params: token_logprobs(model, params, ids, remat=True).sum()))(model.params)
    assert ours.keys() == expected.keys()
    for parameter, gradient in ours.items():
        assert_close(gradient, expected[parameter], parameter)


@pytest.mark.parametrize(
    "kinds", [("F32", "Q4_K"), *(pytest.param(each, marks=pytest.mark.sweep) for each in (("Q4_K", "Q6_K"), ("Q4_0",)))]
)
def test_gradients_through_stored_weights_are_those_through_dense_ones(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Of what is not in blocks: norms, and biases where there are any."""
    path = tmp_path / "blocks.gguf"
    write_llama(path, lambda name: kinds[int("blk.1" in name and len(kinds) > 1)], layers=2)
    model = load_model(open_model(resolve(str(path))), stored="exact")
    assert isinstance(model.params["layers.attn.o.weight"], StoredWeights)
    dense = {name: dequantised(value) for name, value in model.params.items()}
    plain = replace(model, params=dense)
    ids = np.array([range(3, 20), range(30, 47)], np.int32)
    free = {name for name, value in model.params.items() if not isinstance(value, StoredWeights)}

    def gradient(of: LoadedModel) -> Params:
        fixed = {name: value for name, value in of.params.items() if name not in free}
        run = jax.grad(lambda own: token_logprobs(of, {**fixed, **own}, ids).sum())
        return jax.jit(run)({name: of.params[name] for name in free})

    expected = gradient(plain)
    for name, found in gradient(model).items():
        assert_close(found, expected[name], name)


def dequantised(value: object) -> object:
    """A matrix of all layers as float32."""
    if not isinstance(value, StoredWeights):
        return value
    layers = []
    for stack, index in value.places:
        blocks, kind = value.blocks[stack][index], value.kinds[stack]
        layers.append(dequantise(untile(blocks, kind) if value.is_tiled(stack) else blocks, kind))
    whole = jnp.stack(layers)
    return whole if len(layers) > 1 else whole[0]


def test_padding_and_other_segments_change_no_gradient() -> None:
    model, (first, second) = load("llama_gqa"), golden("llama_gqa").prompts

    def gradient(ids: np.ndarray, segments: np.ndarray | None, mask: np.ndarray) -> Params:
        def loss(params: Params) -> jax.Array:
            return jnp.where(mask, token_logprobs(model, params, ids, segments=segments), 0.0).sum()

        return jax.jit(jax.grad(loss))(model.params)

    alone = gradient(np.array([first]), None, np.ones((1, len(first)), bool))
    padded = np.array([[*first, 0, 0, 0]], np.int32)
    packed = np.array([[*second, *first]], np.int32)
    segments = np.array([[1] * len(second) + [2] * len(first)], np.int32)
    for ids, own, mask in (
        (padded, None, np.arange(padded.shape[1]) < len(first)),
        (packed, segments, np.arange(packed.shape[1]) >= len(second)),
    ):
        for name, found in gradient(ids, own, mask[None]).items():
            assert_close(found, alone[name], name)
