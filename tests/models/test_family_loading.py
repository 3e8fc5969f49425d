"""A Hugging Face directory that does not fit its config, or is damaged: one error that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_infer.base.errors import ModelError, UserError
from llm_infer.models.load import compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve
from tests.models.family_checkpoints import FOLDER, NAMES, load


def copy(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(FOLDER / name, folder / name))


def change(directory: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def check_error(directory: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(open_model(resolve(str(directory))))


@pytest.mark.parametrize("name", NAMES)
def test_missing_surplus_and_misshapen_tensors(name: str, tmp_path: Path) -> None:
    directory = copy(name, tmp_path)
    number = 2 if name in ("lfm2_gqa", "lfm2_moe_gqa") else 1  # one that attends
    block = f"model.decoder.layers.{number}." if name.startswith("opt") else f"model.layers.{number}."
    matrix = "qkv_proj" if name.startswith("phi3") else "v_proj"
    change(directory, lambda tensors: tensors.pop(f"{block}self_attn.{matrix}.weight"))
    check_error(directory, rf"missing \(1\): {block}self_attn.{matrix}.weight$")

    directory = copy(name, tmp_path / "surplus")
    change(directory, lambda tensors: tensors.update({block + "self_attn.twist": np.zeros(4, np.float32)}))
    check_error(directory, rf"surplus \(1\): {block}self_attn.twist$")

    directory, out = copy(name, tmp_path / "shape"), "out_proj" if name.startswith(("opt", "lfm2")) else "o_proj"
    change(directory, lambda tensors: tensors.update({f"{block}self_attn.{out}.weight": np.zeros((7, 32), np.float32)}))
    check_error(directory, rf"wrong shape \(1\): .*{block}self_attn.{out}.weight \[7, 32\]")


def test_truncated_file_and_unknown_key(tmp_path: Path) -> None:
    directory = copy("qwen3_gqa", tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_error(directory, f"{file}: .*cut short or damaged")

    directory = copy("qwen3_gqa", tmp_path / "key")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"use_ssm": True}))
    check_error(directory, "keys this architecture does not know: use_ssm")


def test_a_sharded_directory(tmp_path: Path) -> None:
    directory = copy("qwen3_moe_mha", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = [dict(list(tensors.items())[i::3]) for i in range(3)]
    weight_map = {}
    for index, shard in enumerate(shards):
        filename = f"model-{index + 1:05}-of-00003.safetensors"
        save_file(shard, directory / filename)
        weight_map |= dict.fromkeys(shard, filename)
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found, expected = load_model(open_model(resolve(str(directory)))), load("qwen3_moe_mha")
    assert found.config == expected.config
    for param, values in expected.params.items():
        np.testing.assert_array_equal(found.params[param], values, err_msg=param)
    (directory / "model-00002-of-00003.safetensors").unlink()
    check_error(directory, "model-00002-of-00003.safetensors is missing")


def test_types_of_weights_and_what_they_exclude() -> None:
    assert compute_dtype("bfloat16", "exact") == (jnp.dtype(jnp.bfloat16), None)
    assert compute_dtype("auto", "exact")[0] == jnp.float32
    with pytest.raises(UserError, match="dtype='int4': expected auto, float32, bfloat16, float16"):
        compute_dtype("int4", "exact")
    with pytest.raises(UserError, match="dtype=bfloat16 is not float32"):
        compute_dtype("bfloat16", "fast")
