"""What configs leave out, or spell as older versions of transformers did, is what transformers takes for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig, RopeConfig
from llm_infer.models.load import load_model
from llm_infer.models.opened import open_model
from llm_infer.models.registry import family
from llm_infer.models.rotary import frequencies
from llm_infer.models.text_part import text_config
from llm_infer.weights.sources import read_json, resolve
from tests.models.family_checkpoints import FOLDER

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config_of(name: str, change: dict[str, Any], without: tuple[str, ...] = ()) -> ModelConfig:
    values = {key: value for key, value in read_json(FOLDER / name / "config.json").items() if key not in without}
    return family(values).config(values | change)


def test_olmo3_scales_full_layers_alone() -> None:
    older = config_of("olmo3_gqa", {"rope_theta": 5e5, "rope_scaling": YARN}, without=("rope_parameters",))
    assert [rope.factor for rope in older.layer_ropes if rope] == [1.0, 4.0, 1.0]
    assert {rope.theta for rope in older.layer_ropes if rope} == {5e5}


@pytest.mark.parametrize("parameters", [{"full_attention": {"rope_theta": 1e6}}, {"sliding_attention": {}}])
def test_gemma3_slides_with_a_base_of_its_own(parameters: dict[str, Any]) -> None:
    found = config_of("gemma3_gqa", {"rope_parameters": parameters})
    assert [rope.theta for rope in found.layer_ropes if rope] == [1e4, 1e4, 1e6]


@pytest.mark.parametrize(("name", "bases"), [("gemma3_gqa", [1e4, 1e4, 1e6]), ("olmo3_gqa", [500.0, 1e4, 500.0])])
def test_windows_that_hide_nothing_leave_the_rotations(name: str, bases: list[float]) -> None:
    found = config_of(name, {"sliding_window": 64})
    assert found.windows == () and [rope.theta for rope in found.layer_ropes if rope] == bases


def test_what_is_absent() -> None:
    rope = config_of("smollm3_mha", {}, without=("rope_parameters",)).rope
    assert rope is not None and rope.theta == 2e6
    rope = config_of("gpt_oss_mha", {}, without=("rope_parameters",)).rope
    assert rope is not None and (rope.kind, rope.factor, rope.theta, rope.truncate) == ("yarn", 32.0, 150000.0, False)
    assert config_of("glm4_mha", {}, without=("num_key_value_heads",)).num_kv_heads == 2
    kept = {"num_attention_heads": 8}
    assert all(
        config_of(name, kept, without=("num_key_value_heads",)).num_kv_heads == 8
        for name in ("mistral_gqa", "mixtral_gqa", "gpt_oss_gqa")
    )
    longer = {"max_position_embeddings": 8192}
    assert set(config_of("mistral_mha", longer, without=("sliding_window",)).windows) == {4096}
    assert config_of("mistral_mha", longer | {"sliding_window": None}).windows == ()
    assert config_of("mistral_mha", {"sliding_window": 64}).windows == (), "it hides nothing"


def test_yarn_with_bounds_the_wrong_way_round() -> None:
    rope = RopeConfig(100.0, 4.0, original_max_position=2, kind="yarn")
    kept = frequencies(rope, 64) / frequencies(RopeConfig(100.0), 64)
    assert kept[0] == 1.0 and kept[1] == 1.0  # formula of transformers: (i - 0) / (-7 - 0) is below 0


@pytest.mark.parametrize("count", [1, 2])
def test_files_with_other_head_counts_than_the_config(tmp_path: Path, count: int) -> None:
    directory = Path(shutil.copytree(FOLDER / "phi3_mha", tmp_path / "model"))
    values = read_json(directory / "config.json") | {"num_key_value_heads": count}
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="wrong shape"):
        load_model(open_model(resolve(str(directory))))


def test_numbers_and_names_that_are_none(tmp_path: Path) -> None:
    for key in ("query_pre_attn_scalar", "final_logit_softcapping"):
        with pytest.raises(ModelError, match=key):
            config_of("gemma3_gqa", {key: 10**400})
    with pytest.raises(ModelError, match="num_hidden_layers=2147483647"):
        config_of("mistral_gqa", {"num_hidden_layers": 2**31 - 1})
    with pytest.raises(ModelError, match="truncate"):
        config_of("llama_mha", {"rope_parameters": YARN | {"truncate": "false"}})
    directory = Path(shutil.copytree(FOLDER / "gemma3_gqa", tmp_path / "model"))
    (directory / "config.json").write_text(json.dumps({"architectures": [["a"]], "text_config": {}}))
    with pytest.raises(ModelError, match="architectures"):
        load_model(open_model(resolve(str(directory))))


def test_the_outer_config_says_whether_the_head_is_the_embedding() -> None:
    outer = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False, "a": 1}}
    assert text_config(outer, "X") == {"architectures": ["X"], "a": 1, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("down_proj_scales", None),
        ("down_proj_scales", lambda array: array[:-1]),
        ("down_proj_scales", lambda array: array[0, 0, 0]),
        ("gate_up_proj_blocks", lambda array: array[:, :-1]),
        ("gate_up_proj_blocks", lambda array: array[..., :8]),
        ("gate_up_proj_blocks", lambda array: array.astype(np.float32)),
        ("gate_up_proj_bias", lambda array: array[0]),
    ],
)
def test_damaged_experts(tmp_path: Path, key: str, change: Any) -> None:
    directory = Path(shutil.copytree(FOLDER / "gpt_oss_gqa", tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[name + "_blocks"] = np.zeros((experts, rows, columns // 32, 16), np.uint8)
        tensors[name + "_scales"] = np.zeros((experts, rows, columns // 32), np.uint8)
    name = f"model.layers.1.mlp.experts.{key}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts"):
        load_model(open_model(resolve(str(directory))))
