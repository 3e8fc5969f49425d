"""Run by test_given_meshes in a process of its own: models as values on others' meshes of eight fake CPU devices.

Arguments are names of checks; none stands for all. Prints a line of JSON: what was checked, and what failed.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_infer import LLM, SamplingParams, load_model
from llm_infer.checkpoints import export_hf, save
from llm_infer.functional import LoadedModel, decode_step, forward, make_cache, token_logprobs
from llm_infer.models.new_weights import weights_digest
from llm_infer.models.params import split_model
from llm_infer.models.sharded import arrange, restore
from llm_infer.train import finetune
from tests.models.family_checkpoints import FOLDER, golden

DEVICES = np.array(jax.devices())
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def load(name: str, **where: Any) -> LoadedModel:
    return load_model(FOLDER / name, weights="dense", skip_tokenizer_init=True, progress=False, **where)


def answers(llm: LLM, name: str) -> list[list[int]]:
    return [one.outputs[0].token_ids for one in llm.generate(golden(name).prompts, GREEDY)]


def serve(model: LoadedModel) -> LLM:
    return LLM.from_model(model, max_num_seqs=2, max_num_batched_tokens=16, num_pages=40, progress=False)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return Mesh(DEVICES.reshape(shape), names)


MESHES: dict[str, tuple[str, dict[str, Any]]] = {
    "data, model": ("llama_gqa", {"mesh": mesh_of((4, 2), ("data", "model"))}),
    "two axes for shards, named by the caller": (
        "llama_gqa",
        {"mesh": mesh_of((2, 2, 2), ("a", "b", "c")), "axes": {"a": "dp", "b": "tp", "c": "dp"}},
    ),
    "experts, model first": ("qwen3_moe_gqa", {"mesh": mesh_of((2, 2, 2), ("tensor", "expert", "fsdp"))}),
    "explicit axes": ("gemma3_gqa", {"mesh": jax.make_mesh((2, 4), ("model", "data"))}),
    "copies of KV heads": ("qwen3_gqa", {"mesh": mesh_of((8,), ("tensor",))}),
    "devices": ("llama_gqa", {"devices": DEVICES[4:8], "tensor_parallel_size": 2, "data_parallel_size": 2}),
    "one device": ("llama_gqa", {"devices": DEVICES[5:6]}),
}


def served(name: str, where: dict[str, Any]) -> None:
    """An engine gives the tokens of one device, also after weights of another sharding and under the caller's mesh."""
    expected = answers(serve(load(name)), name)
    model = load(name, **where)
    used = {device for value in model.params.values() for device in value.sharding.device_set}
    assert used == set(np.asarray(where["mesh"].devices if "mesh" in where else where["devices"]).flat), used
    llm = serve(model)
    assert answers(llm, name) == expected
    digest = llm.weights_digest()
    llm.update_weights(model.params)
    llm.update_weights({name: np.asarray(value) for name, value in load(name).params.items()})
    away = Mesh(DEVICES[:2], ("x",))
    cut = NamedSharding(away, PartitionSpec("x"))
    spread = {n: jax.device_put(v, cut if v.shape[0] % 2 == 0 else None) for n, v in load(name).params.items()}
    llm.update_weights(spread)
    assert llm.weights_digest() == digest and answers(llm, name) == expected
    if "mesh" in where:
        assert model.mesh is where["mesh"]
        with jax.set_mesh(model.mesh):
            assert answers(serve(model), name) == expected


def computed(name: str, where: dict[str, Any]) -> None:
    """Forward pass, gradient and decoding steps are those of one device."""
    one, model = load(name), load(name, **where)
    ids = np.random.default_rng(0).integers(3, one.config.vocab_size, (4, 9)).astype(np.int32)

    def close(found: Any, expected: Any) -> None:
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-4)

    for of in (forward, token_logprobs):
        expected, found = (jax.jit(partial(of, each))(each.params, ids) for each in (one, model))
        jax.tree.map(close, found, expected)
    caches = [make_cache(each, 4, 32) for each in (one, model)]
    steps = [jax.jit(partial(decode_step, each), donate_argnums=1) for each in (one, model)]
    counts = np.array([9, 4, 1, 7], np.int32)
    for step_ids, step_counts in ((ids, counts), (ids[:, 0], None)):
        found = [
            step(each.params, cache, step_ids, step_counts)
            for step, each, cache in zip(steps, (one, model), caches, strict=True)
        ]
        caches = [cache for _, cache in found]
        close(found[1][0], found[0][0])
    gradients = [
        jax.jit(jax.grad(lambda params, each=each: token_logprobs(each, params, ids, remat=True).sum()))(each.params)
        for each in (one, model)
    ]
    specs = split_model(model.config, model.dtype)[1]
    for parameter, expected in gradients[0].items():
        found = restore(np.asarray(gradients[1][parameter]), specs[parameter].axes, model.config)
        scale = max(1e-3, float(np.abs(expected).max()))
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4, err_msg=parameter)


def kept(name: str, where: dict[str, Any]) -> None:
    """What is written of a model on a mesh is the whole model."""
    model, digest = load(name, **where), weights_digest(load(name).params)
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, f"{folder}/hf", progress=False)
        save(model, f"{folder}/orbax", progress=False)
        for kind in ("hf", "orbax"):
            again = load_model(f"{folder}/{kind}", weights="dense", skip_tokenizer_init=True, progress=False)
            assert weights_digest(again.params) == digest, kind


def trained(name: str, where: dict[str, Any]) -> None:
    """Two steps give the weights of one device, where they were."""
    examples = [([5, 6, 7], [9, 10, 11]), ([8, 9], [3, 4, 5, 6])]
    found = [
        finetune(each, examples, steps=2, batch_size=4, optimizer=optax.sgd(1e-2), progress=False)
        for each in (load(name), load(name, **where))
    ]
    tuned, config = [each.model for each in found], found[1].model.config
    axes = split_model(config, tuned[1].dtype)[1]
    for parameter, expected in tuned[0].params.items():
        mine = tuned[1].params[parameter]
        assert mine.sharding.is_equivalent_to(load(name, **where).params[parameter].sharding, mine.ndim), parameter
        found = np.asarray(restore(np.asarray(mine), axes[parameter].axes, config))
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=parameter)
        again = arrange(found, axes[parameter].axes, config)
        assert (again == np.asarray(mine)).all(), f"copies of {parameter} differ"


def checks() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for title, (name, where) in MESHES.items():
        found[f"{title}: served"] = partial(served, name, where)
        if title != "one device":
            found[f"{title}: computed"] = partial(computed, name, where)
    found["experts, model first: kept"] = partial(kept, *MESHES["experts, model first"])
    found["copies of KV heads: trained"] = partial(trained, *MESHES["copies of KV heads"])
    found["data, model: trained"] = partial(trained, *MESHES["data, model"])
    return found


if __name__ == "__main__":
    failures, chosen = {}, sys.argv[1:] or list(checks())
    for title in chosen:
        try:
            checks()[title]()
        except Exception as error:
            failures[title] = f"{type(error).__name__}: {error!s:.600}"
    print(json.dumps({"checked": chosen, "failures": failures}))
