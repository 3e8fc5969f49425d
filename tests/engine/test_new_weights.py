"""New weights in an engine that runs: those of a fresh engine to the bit, nothing compiled, no cached prefix served again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.base.errors import ModelError, UserError
from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.load import LoadedModel, compute_dtype, load_model
from llm_infer.models.new_weights import weights_digest, with_weights
from llm_infer.models.opened import open_model
from llm_infer.models.params import random_params
from llm_infer.weights.sources import resolve
from tests.models.family_checkpoints import FOLDER
from tests.models.test_family_gguf import one_kind, write_gguf

STORED = compute_dtype("auto", "exact")[1]
PROMPTS = [list(range(3, 40)), list(range(60, 80))]


def opened(name: str) -> Any:
    return open_model(resolve(str(FOLDER / name)))


def make_engine(model: LoadedModel, like: Engine | None = None) -> Engine:
    """Makes an engine; `like` is one whose compiled programs it takes."""
    engine = Engine(model, EngineConfig(CacheConfig(num_pages=40), SchedulerConfig(4, 64, 64)))
    if like is not None:
        engine.runner._programs = like.runner._programs
    return engine


def answers(engine: Engine) -> list[list[tuple[int, float]]]:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)
    requests = [engine.add_request(prompt, params) for prompt in PROMPTS]
    found: dict[object, list[tuple[int, float]]] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.logprobs is not None
            found.setdefault(event.sequence, []).append((event.token_id, event.logprobs.logprob))
    return [found[request.sequences[0]] for request in requests]


def other_weights(name: str, seed: int) -> dict[str, jax.Array]:
    return random_params(load_model(opened(name)).config, seed=seed)


def hugging_face_tensors(name: str, scale: float) -> dict[str, np.ndarray]:
    source = opened(name).tensors
    found = {}
    for tensor in source.names:
        found[tensor] = np.empty(source.shape(tensor), np.float32)
        source.read_into(tensor, found[tensor])
        if found[tensor].ndim > 1:
            found[tensor] *= scale
    return found


@pytest.mark.parametrize(("name", "stored"), [("llama_gqa", STORED), ("llama_gqa", None), ("qwen3_moe_gqa", STORED)])
def test_the_engine_gives_what_a_fresh_one_gives(name: str, stored: str | None) -> None:
    engine = make_engine(load_model(opened(name), stored=stored))
    first = answers(engine)
    for step in range(3):
        weights = other_weights(name, step)
        engine.set_weights(with_weights(engine.runner.model, weights))
        compiles = engine.runner.times.compiles
        found = answers(engine)
        assert engine.runner.times.compiles == compiles
        fresh = make_engine(with_weights(load_model(opened(name), stored=stored), weights), like=engine)
        assert found == answers(fresh) != first
        assert weights_digest(engine.runner.model.params) == weights_digest(fresh.runner.model.params)
    assert engine.weights_version == "update-3"


def test_a_hundred_updates_leave_nothing_behind() -> None:
    engine = make_engine(load_model(opened("llama_gqa"), stored=STORED))
    both = [other_weights("llama_gqa", seed) for seed in (1, 2)]
    expected = []
    for weights in both:
        engine.set_weights(with_weights(engine.runner.model, weights))
        expected.append(answers(engine))
    assert expected[0] != expected[1]
    compiles, arrays = engine.runner.times.compiles, len(jax.live_arrays())
    for number in range(100):
        engine.set_weights(with_weights(engine.runner.model, both[number % 2]))
        assert answers(engine) == expected[number % 2]
        cache = engine.scheduler.prefix_cache
        assert cache is not None and cache.num_hits == 0
    assert engine.runner.times.compiles == compiles
    assert len(jax.live_arrays()) <= arrays + 5


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3_gqa", "qwen3_moe_gqa", "phi3_gqa", "glm4_moe_gqa"])
def test_tensors_under_the_names_of_hugging_face(name: str) -> None:
    model = load_model(opened(name), stored=STORED)
    same = with_weights(model, hugging_face_tensors(name, 1.0).items())
    assert weights_digest(same.params) == weights_digest(model.params)
    scaled = hugging_face_tensors(name, 2.0)
    found = with_weights(model, scaled)
    assert weights_digest(found.params) != weights_digest(model.params)
    embedding = {name: scaled[name] for name in scaled if "embed_tokens" in name}
    partial = with_weights(model, embedding)
    changed = [k for k, v in partial.params.items() if v is not model.params[k]]
    assert changed == ["embed.weight"]
    read, np_one = found.params["embed.weight"], next(iter(embedding.values()))
    np.testing.assert_array_equal(np.asarray(read.blocks[0][0], np.float32), np_one)


@pytest.mark.skipif(STORED is None, reason="needs the native CPU kernels")
def test_blocks_are_made_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen2_gqa", "qwen2", one_kind)
    source = open_model(resolve(str(tmp_path / "model.gguf")))
    stored, dense = load_model(source, stored=STORED), load_model(source)
    same = with_weights(stored, dense.params)
    up = "layers.mlp.up.weight"
    assert stored.params[up].kinds == ("q4_1",)
    assert weights_digest(same.params) == weights_digest(stored.params)
    mixed = load_model(source, stored=STORED, dense=True)
    assert mixed.params[up].kinds == ("f32",)
    np.testing.assert_array_equal(mixed.params[up].blocks[0], dense.params[up])


class _Broken:
    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("no values")


class _Torch:
    """An array whose type is not NumPy's, as PyTorch's are."""

    dtype, shape = "torch.float32", (128, 32)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.full(self.shape, 0.25, np.float32)


@pytest.mark.skipif(STORED is None, reason="needs the native CPU kernels")
def test_arrays_of_others_and_a_tied_head() -> None:
    model = load_model(opened("llama_gqa"), stored=STORED)
    for name in ("embed.weight", "model.embed_tokens.weight", "lm_head.weight"):
        found = with_weights(model, {name: _Torch()}).params["embed.weight"]
        assert (jnp.asarray(getattr(found, "blocks", [found])[0], jnp.float32) == 0.25).all()
    table = np.ones((128, 32), np.float32)
    both = with_weights(model, {"model.embed_tokens.weight": table, "lm_head.weight": table.copy()})
    assert weights_digest(both.params) == weights_digest(with_weights(model, {"lm_head.weight": table}).params)
    assert weights_digest(with_weights(both, model.params).params) == weights_digest(model.params)
    assert weights_digest(with_weights(both, model.params, copy=True).params) == weights_digest(model.params)
    with pytest.raises(ModelError, match=r"lm_head\.weight: matrices in blocks have the names"):
        with_weights(model, {"lm_head.weight": model.params["embed.weight"]})


def test_what_is_refused() -> None:
    model = load_model(opened("llama_gqa"), stored=STORED)
    good = other_weights("llama_gqa", 1)
    gone = jnp.ones(good["final_norm.weight"].shape)
    gone.delete()
    up, table, gone_shape = (
        good["layers.mlp.up.weight"],
        np.asarray(good["embed.weight"]),
        np.zeros(gone.shape, np.float32),
    )
    cases: dict[str, Mapping[str, Any]] = {
        "no parameter layers.mlp.sideways": {**good, "layers.mlp.sideways": up},
        "neither parameters of the model": {"transformer.wte": up},
        r"layers.mlp.up.weight has the shape \[2, 3\]": {"layers.mlp.up.weight": np.zeros((2, 3), np.float32)},
        "final_norm.weight has the type int32": {"final_norm.weight": np.zeros(gone.shape, np.int32)},
        "final_norm.weight was deleted": {"final_norm.weight": gone},
        "there are no weights": {},
        "final_norm.weight is there twice": {"final_norm.weight": gone_shape, "final_norm": {"weight": gone_shape}},
        "final_norm.weight is _Broken, expected an array: no values": {"final_norm.weight": _Broken()},
        "lm_head.weight differs": {"model.embed_tokens.weight": table, "lm_head.weight": 2 * table},
        "missing.*layers.1.mlp.up_proj": {
            "model.layers.0.mlp.up_proj.weight": np.zeros(up.shape[1:], np.float32),
        },
    }
    for message, weights in cases.items():
        with pytest.raises(ModelError, match=message):
            with_weights(model, weights)


def test_arrays_are_taken_by_reference_or_copied() -> None:
    model = load_model(opened("llama_gqa"))
    new = jnp.ones_like(model.params["final_norm.weight"])
    by_reference = with_weights(model, {"final_norm": {"weight": new}})
    assert by_reference.params["final_norm.weight"] is new or (
        by_reference.params["final_norm.weight"].unsafe_buffer_pointer() == new.unsafe_buffer_pointer()
    )
    copied = with_weights(model, {"final_norm.weight": new}, copy=True)
    engine = make_engine(copied)
    new.delete()
    assert answers(engine)
    engine.set_weights(by_reference)
    with pytest.raises(UserError, match=r"final_norm\.weight was deleted"):
        answers(engine)
    engine.set_weights(copied)
    assert answers(engine)


def test_requests_that_run_go_on() -> None:
    engine = make_engine(load_model(opened("llama_gqa"), stored=STORED))
    request = engine.add_request(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.set_weights(with_weights(engine.runner.model, other_weights("llama_gqa", 1)), "second")
    after = engine.add_request(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=2))
    late = engine.add_request(PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=2), queue=False)
    engine.set_weights(engine.runner.model, "third")
    engine.queue(late)
    while engine.has_work:
        engine.step()
    assert len(request.sequences[0].output) == 12
    assert request.weights_versions == ["update-0", "second", "third"]
    assert after.weights_versions == late.weights_versions == ["third"], "neither had begun"
    assert after.num_cached_tokens == 0


def test_an_engine_sleeps_and_wakes() -> None:
    engine = make_engine(load_model(opened("llama_gqa"), stored=STORED))
    first, compiles = answers(engine), engine.runner.times.compiles
    weights = hugging_face_tensors("llama_gqa", 1.0)
    matrix = tuple(engine.runner.model.params["layers.mlp.up.weight"].shape)
    pool = engine.runner.state.cache["pages"].shape

    def held(shape: tuple[int, ...]) -> int:
        return sum(array.shape == shape for array in jax.live_arrays())

    before = held(pool), held(matrix)
    engine.sleep(weights=False)
    assert (held(pool), held(matrix)) == (before[0] - 1, before[1])
    with pytest.raises(UserError, match="sleeps: wake it first"):
        engine.add_request(PROMPTS[0])
    engine.wake()
    assert answers(engine) == first
    engine.sleep(weights=True)
    assert (held(pool), held(matrix)) == (before[0] - 1, before[1] - 2)  # "up" and "gate"
    with pytest.raises(ModelError, match="were given up"):
        weights_digest(engine.runner.model.params)
    with pytest.raises(UserError, match="9 parameters are not set since"):
        engine.wake()
    engine.set_weights(with_weights(engine.runner.model, weights))
    engine.wake()
    engine.wake()
    assert answers(engine) == first and engine.runner.times.compiles == compiles
    engine.add_request(PROMPTS[0])
    with pytest.raises(UserError, match="requests run"):
        engine.sleep(weights=False)
