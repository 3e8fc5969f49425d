"""What a model tells `attend` reaches the kernels of the paged engine, layer by layer: scale, window, softcap, sinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.base.errors import ModelError
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models import params, registry
from llm_infer.models.config import ModelConfig
from llm_infer.models.decoder import EVERYTHING, Attention, Decoder, window_of
from llm_infer.models.families import qwen2
from llm_infer.models.layers import Layer, parameter
from llm_infer.models.load import LoadedModel, dummy_model
from llm_infer.weights.sources import read_json
from tests.models.family_checkpoints import FOLDER, dense

SMALL = ModelConfig("LlamaForCausalLM", 64, 32, 4, 4, 2, 8, 64, 64, windows=(None, 3, 9, None))


class EverythingAttention(Attention):
    """Attention that asks for all that the kernels can do."""

    def __init__(self, config: ModelConfig, *, dtype: Any) -> None:
        super().__init__(config, dtype=dtype)
        self.sinks = parameter((config.num_layers, config.num_heads), ("layers", "heads"), dtype=dtype, std=1.0)

    def options(self, layer: Layer) -> dict[str, Any]:
        return super().options(layer) | {"scale": 0.21, "softcap": 2.5, "sinks": self.sinks[...][layer]}


class EverythingDecoder(Decoder):
    def __init__(self, config: ModelConfig, *, dtype: Any) -> None:
        super().__init__(config, dtype=dtype)
        self.layers.attn = EverythingAttention(config, dtype=dtype)


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    """Random weights, large enough that every option shows."""
    family = registry.Family("llm_infer.models.families.llama", f"{__name__}:EverythingDecoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "LlamaForCausalLM", family)
        params.split_model.cache_clear()
        made = dummy_model(SMALL, seed=3)
        yield replace(made, params={name: value * (3 if "qkv" in name else 1) for name, value in made.params.items()})
        params.split_model.cache_clear()


def greedy(model: LoadedModel, prompt: list[int], *, chunk: int, **scheduler: Any) -> list[int]:
    limits = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=chunk, max_model_len=48, **scheduler)
    engine = Engine(model, EngineConfig(CacheConfig(page_size=8, num_pages=16), limits, check_every_step=True))
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    request, _ = (engine.add_request(ids, sampling) for ids in (prompt, prompt[:5]))
    while engine.has_work:
        engine.step()
    return request.sequences[0].output


@pytest.mark.parametrize(("chunk", "scheduler"), [(6, {}), (32, {}), (32, {"num_scheduler_steps": 4})])
def test_all_that_the_kernels_can_do_is_reached_from_a_model(
    model: LoadedModel, chunk: int, scheduler: dict[str, Any]
) -> None:
    prompt = np.random.default_rng(1).integers(0, 64, 19).tolist()
    found = greedy(model, prompt, chunk=chunk, **scheduler)
    # Each token is the likeliest after those before it.
    assert found == dense(model, prompt + found)[0][len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("dropped", ["scale", "window", "softcap", "sinks"])
def test_every_option_shows(model: LoadedModel, dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(1).integers(0, 64, 19).tolist()
    with_all = dense(model, ids)[0]
    options = EverythingAttention.options

    def without(self: Attention, layer: Layer) -> dict[str, Any]:
        return options(self, layer) | {dropped: 1.0 if dropped == "scale" else None}

    monkeypatch.setattr(EverythingAttention, "options", without)
    assert np.abs(dense(model, ids)[0] - with_all).max() > 1e-3


def test_a_window_of_all_layers_is_a_plain_number() -> None:
    assert window_of((), jnp.int32(0)) is None and window_of((7, 7), jnp.int32(1)) == 7
    found = jax.jit(lambda layer: window_of((None, 7), layer))
    assert [int(found(layer)) for layer in (0, 1)] == [EVERYTHING, 7]


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({}, (None, 5, 5)),
        ({"layer_types": None, "max_window_layers": 2}, (None, None, 5)),
        ({"layer_types": None, "max_window_layers": 0}, (5, 5, 5)),
        ({"layer_types": None, "max_window_layers": 28}, ()),
        ({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, (5, None, None)),
        ({"layer_types": None, "use_sliding_window": False}, ()),
        ({"layer_types": None, "sliding_window": None}, ()),
    ],
)
def test_windows_of_a_config(change: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert qwen2.config(read_json(FOLDER / "qwen2_window" / "config.json") | change).windows == windows


def test_windows_that_do_not_fit_are_refused() -> None:
    for windows in ((3,), (None, 3, 9, 0)):
        with pytest.raises(ModelError, match="expected one for each of the 4 layers"):
            replace(SMALL, windows=windows)
