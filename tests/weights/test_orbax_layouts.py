"""Orbax checkpoints that others wrote, in every layout that Orbax has: loaded as models, and read as new weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from llm_infer.base.errors import ModelError
from llm_infer.models.load import LoadedModel, load_model, save_model
from llm_infer.models.new_weights import weights_digest, with_weights
from llm_infer.models.opened import open_model
from llm_infer.weights.orbax_checkpoint import MANIFEST, PARAMS, Checkpoint
from llm_infer.weights.orbax_reading import read_orbax
from llm_infer.weights.sources import resolve
from tests.models.family_checkpoints import load

Save = Callable[[Path, Any], None]


def standard(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def by_handler(**options: bool) -> Save:
    def save(path: Path, tree: Any) -> None:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(tree))

    return save


SAVES: dict[str, Save] = {
    "standard": standard,
    "pytree": by_handler(),
    "zarr": by_handler(use_ocdbt=False),
    "uncompressed": by_handler(use_ocdbt=False, use_compression=False),
    "zarr3": by_handler(use_ocdbt=False, use_zarr3=True),
    "zarr3 in a database": by_handler(use_zarr3=True),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("absl"), "level", logging.ERROR)


def nested(flat: Mapping[str, Any], leaf: Callable[[Any], Any] = lambda value: value) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split(".")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = leaf(value)
    return tree


def reload(path: Path, **options: Any) -> LoadedModel:
    return load_model(open_model(resolve(str(path))), **options)


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


# Models whose parameters are in another layout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_model(load("llama_gqa"), path, {})
    return path


def resaved(source: Path, path: Path, save: Save, tree: Any) -> Path:
    shutil.copytree(source, path)
    shutil.rmtree(path / PARAMS)
    save(path / PARAMS, tree)
    return path


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        *((layout, "nested") for layout in SAVES),
        *((each, s) for each in ("standard", "uncompressed") for s in ("flat", "variables")),
    ],
)
def test_a_model_in_every_layout(layout: str, shape: str, saved: Path, tmp_path: Path) -> None:
    params = load("llama_gqa").params
    tree = {"flat": params, "nested": nested(params), "variables": nested(params, lambda value: {"value": value})}
    path = resaved(saved, tmp_path / "model", SAVES[layout], tree[shape])
    check_same(reload(path).params, params)
    mapped = Checkpoint(path).array("embed.weight").single_file is not None
    assert mapped == (layout == "uncompressed" and shape != "variables")
    half = reload(path, dtype=jnp.bfloat16).params
    assert half["embed.weight"].dtype == jnp.bfloat16


def test_shardings_are_honoured(saved: Path, tmp_path: Path) -> None:
    params = load("llama_gqa").params
    path = resaved(saved, tmp_path / "model", standard, nested(params))
    place = SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
    specs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in params.items()}
    found = Checkpoint(path).restore(specs, shardings=dict.fromkeys(params, place))
    check_same(found, params)
    assert all(array.sharding == place for array in found.values())


@pytest.mark.parametrize("layout", ["standard", "zarr", "zarr3"])
def test_damage_in_every_layout(layout: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llm_infer.weights.orbax_tree.BATCH_BYTES", 1
    )  # of several that fail, Orbax loses sight of some
    path = resaved(saved, tmp_path / "model", SAVES[layout], nested(load("llama_gqa").params))
    biggest = max((file for file in (path / PARAMS).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = biggest.read_bytes()
    for damaged in (content[: len(content) // 2], None):
        biggest.unlink() if damaged is None else biggest.write_bytes(damaged)
        with pytest.raises(
            ModelError, match=r"(?s)Orbax cannot restore|is missing; the checkpoint is damaged"
        ) as caught:
            reload(path)
        assert "\n" not in str(caught.value)
        with pytest.raises(ModelError, match=r"Orbax cannot restore"):
            read_orbax(path / PARAMS)
    (path / PARAMS / "_METADATA").write_text("{")
    with pytest.raises(ModelError, match=r"Orbax cannot restore" if layout != "zarr" else "damaged"):
        reload(path)


def test_other_parameters(saved: Path, tmp_path: Path) -> None:
    params = dict(load("llama_gqa").params)
    params["extra.weight"] = params.pop("final_norm.weight")
    path = resaved(saved, tmp_path / "model", standard, params)
    with pytest.raises(ModelError, match=r"missing \(1\): final_norm\.weight; surplus \(1\): extra\.weight"):
        reload(path)


@pytest.mark.parametrize("name", ["gemma3_gqa", "glm4_moe_gqa"])
def test_half_types_beside_parameters_that_are_always_float32(name: str, tmp_path: Path) -> None:
    model = load(name, dtype="bfloat16")
    assert len({str(array.dtype) for array in model.params.values()}) == 2
    save_model(model, tmp_path / "m", {})
    assert json.loads((tmp_path / "m" / MANIFEST).read_text())["dtype"] == "bfloat16"
    check_same(reload(tmp_path / "m", dtype=jnp.bfloat16).params, model.params)


# Trees of any program


@pytest.mark.parametrize("layout", SAVES)
def test_new_weights_of_a_model(layout: str, tmp_path: Path) -> None:
    """Under our names or Hugging Face's, in nested mappings, beside the rest of a training state."""
    model = load("llama_gqa")
    other = {name: 2 * array for name, array in model.params.items()}
    state = {"params": nested(other), "opt_state": [nested(other), {"count": 3}], "step": 7}
    SAVES[layout](tmp_path / "state", state)
    found = read_orbax(tmp_path / "state")
    check_same(found, other)
    digest = weights_digest(with_weights(model, other).params)
    assert weights_digest(with_weights(model, found).params) == digest


def test_tensors_of_hugging_face(tmp_path: Path) -> None:
    from llm_infer.models.export import hf_tensors

    model = load("qwen2_gqa")
    standard(tmp_path / "hf", nested({name: 2 * array for name, array in hf_tensors(model)}))
    expected = with_weights(model, {name: 2 * array for name, array in hf_tensors(model)})
    found = with_weights(model, read_orbax(tmp_path / "hf"))
    assert weights_digest(found.params) == weights_digest(expected.params) != weights_digest(model.params)


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.more = nnx.List([nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2)])


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_and_lists(pure: bool, tmp_path: Path) -> None:
    state = nnx.state(Network(nnx.Rngs(0)))
    standard(tmp_path / "nnx", nnx.to_pure_dict(state) if pure else state)
    expected = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    assert sorted(expected) == ["first.bias", "first.kernel", "more.0.kernel", "more.1.kernel"]
    check_same(read_orbax(tmp_path / "nnx"), expected)
    tree = {"layers": [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}], "host": np.full(3, 2, np.float16), "name": "x", "n": 1}
    by_handler()(tmp_path / "tree", tree)
    found = read_orbax(tmp_path / "tree")
    check_same(found, {"layers.0.w": jnp.ones(2), "layers.1.w": jnp.zeros(2), "host": np.full(3, 2, np.float16)})


def test_managers_steps_and_items(tmp_path: Path) -> None:
    def tree(value: float) -> dict[str, Any]:
        return {"params": {"a": jnp.full(3, float(value))}}

    with ocp.CheckpointManager(tmp_path / "one") as manager:
        for step in (3, 12):
            manager.save(step, args=ocp.args.StandardSave(tree(step)))
    for path, value in {"one": 12, "one/3": 3, "one/3/default": 3}.items():
        check_same(read_orbax(tmp_path / path), {"a": jnp.full(3, float(value))})
    names = ("state", "extra", "other")
    with ocp.CheckpointManager(tmp_path / "two", item_names=names) as manager:
        save = ocp.args.StandardSave
        items = {"state": save(tree(1)), "extra": ocp.args.JsonSave({"a": 1}), "other": save(tree(2))}
        manager.save(0, args=ocp.args.Composite(**items))
    check_same(read_orbax(tmp_path / "two"), {"a": jnp.full(3, 1.0)})
    check_same(read_orbax(str(tmp_path / "two" / "0" / "other")), {"a": jnp.full(3, 2.0)})
    (tmp_path / "two" / "0" / "state").rename(tmp_path / "two" / "0" / "another")
    with pytest.raises(ModelError, match="has several trees: give one of another, other"):
        read_orbax(tmp_path / "two")


def test_types_and_places_of_another_tree(tmp_path: Path) -> None:
    standard(tmp_path / "t", {"a": {"b": jnp.ones((2, 4)), "c": jnp.zeros(3)}, "d": jnp.ones(2)})
    place = SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
    like = {"a": {"b": jax.ShapeDtypeStruct((2, 4), jnp.bfloat16, sharding=place)}, "d": np.zeros(5, np.float32)}
    found = read_orbax(tmp_path / "t", like=like)
    check_same(found, {"a.b": jnp.ones((2, 4), jnp.bfloat16), "d": jnp.ones(2)})
    assert found["a.b"].sharding == place
    with pytest.raises(ModelError, match=r"has no a\.x: it has a\.b, a\.c, d"):
        read_orbax(tmp_path / "t", like={"a.x": np.zeros(2)})


def test_large_trees_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_infer.weights.orbax_tree.BATCH_BYTES", 20)
    tree = {name: jnp.full(4, float(number)) for number, name in enumerate("abcde")}
    standard(tmp_path / "t", tree)
    check_same(read_orbax(tmp_path / "t"), tree)


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "_METADATA").write_text("{}")
    standard(tmp_path / "twice", {"a": {"b": jnp.ones(2)}, "a.b": {"value": jnp.ones(2)}})
    standard(tmp_path / "scalars", {"step": 3})
    cases = {
        "absent": "is no directory: expected an Orbax checkpoint",
        "file": "is no directory",
        "empty": "is no Orbax checkpoint: neither it nor what is in it",
        "nothing": "Orbax cannot restore it",
        "twice": r"a\.b is there twice",
        "scalars": "holds no arrays",
    }
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message) as caught:
            read_orbax(tmp_path / name)
        assert "\n" not in str(caught.value)
