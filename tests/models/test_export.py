"""Weights under Hugging Face's names: those of the file, whatever the family, the mesh and the blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress
from llm_infer.config import ParallelConfig
from llm_infer.models.export import export_hf, hf_specs, hf_tensors
from llm_infer.models.load import LoadedModel, compute_dtype, load_model
from llm_infer.models.opened import GGUF_TOKENIZER, OpenModel, open_model, tokenizer_files
from llm_infer.models.params import split_model
from llm_infer.models.registry import FAMILIES
from llm_infer.models.sharded import arrange, cut_config, restore, why_not
from llm_infer.quant import StoredWeights
from llm_infer.weights.rules import Rule
from llm_infer.weights.sources import resolve
from llm_infer.weights.undo_rules import undo
from tests.models.family_checkpoints import FOLDER, NAMES, load
from tests.models.test_family_gguf import more_bits_for_some_layers, write_gguf

FAMILY_NAMES = [name for name in NAMES if name.endswith("_gqa")] + ["opt_pre", "opt_post"]
STORED = compute_dtype("auto", "exact")[1]


def opened(path: str | Path) -> OpenModel:
    return open_model(resolve(str(path)))


def file_tensors(name: str) -> dict[str, np.ndarray]:
    return load_file(FOLDER / name / "model.safetensors")


def check_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: object = None) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape and found[name].dtype == (dtype or found[name].dtype), name
        np.testing.assert_array_equal(found[name].astype(np.float32), values.astype(np.float32), err_msg=name)


def check_params(found: LoadedModel, expected: LoadedModel) -> None:
    assert found.config == expected.config and found.params.keys() == expected.params.keys()
    for name, values in expected.params.items():
        pairs = zip(jax.tree.leaves(found.params[name]), jax.tree.leaves(values), strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_every_family_is_here() -> None:
    architectures = {json.loads((FOLDER / name / "config.json").read_text())["architectures"][0] for name in NAMES}
    assert architectures == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_those_of_the_file(name: str) -> None:
    model, expected = load(name), file_tensors(name)
    check_same(dict(hf_tensors(model, dtype=jnp.bfloat16)), expected, ml_dtypes.bfloat16)
    check_same(dict(hf_tensors(model)), expected, np.float32)
    described = [(spec.name, spec.shape, spec.dtype) for spec in hf_specs(model)]
    assert described == [(tensor, values.shape, values.dtype) for tensor, values in hf_tensors(model)]


@pytest.mark.parametrize("name", ["gemma3_gqa", "glm4_moe_gqa", "gpt_oss_gqa"])
def test_a_model_in_half_types(name: str) -> None:
    """Norms whose scales are stored less one come back in the file's type; numbers that are always float32 stay so."""
    found = dict(hf_tensors(load(name, dtype="bfloat16")))
    check_same(found, file_tensors(name))
    wide = {tensor for tensor, values in found.items() if values.dtype == np.float32}
    assert all(tensor.endswith("e_score_correction_bias") for tensor in wide)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_is_exported_loads_as_the_same_model(name: str, tmp_path: Path) -> None:
    source = opened(FOLDER / name)
    model = load_model(source)
    limit = sum(spec.nbytes for spec in hf_specs(model, dtype=jnp.bfloat16)) // 3
    path = export_hf(model, tmp_path / "new" / "m", config=source.config, dtype=jnp.bfloat16, shard_bytes=limit)
    check_params(load_model(opened(path)), model)
    assert [file.name for file in path.parent.iterdir()] == ["m"]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    check_same(whole, file_tensors(name), ml_dtypes.bfloat16)
    written = json.loads((path / "config.json").read_text())
    assert written == source.config  # whose type is bfloat16


@pytest.mark.skipif(STORED is None, reason="needs the native CPU kernels")
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3_gqa", "phi3_gqa", "gpt_oss_gqa", "glm4_moe_gqa", "opt_pre"])
def test_weights_as_the_file_stores_them(name: str, tmp_path: Path) -> None:
    source = opened(FOLDER / name)
    model = load_model(source, stored=STORED)
    assert any(isinstance(value, StoredWeights) for value in model.params.values())
    check_same(dict(hf_tensors(model)), file_tensors(name))
    path = export_hf(model, tmp_path / "m", config=source.config)
    check_params(load_model(opened(path), stored=STORED), model)


@pytest.mark.skipif(STORED is None, reason="needs the native CPU kernels")
def test_weights_in_blocks_are_dequantised(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen2_gqa", "qwen2", more_bits_for_some_layers)
    source = opened(tmp_path / "model.gguf")
    model, dense = load_model(source, stored=STORED), load_model(source)
    found, expected = dict(hf_tensors(model)), dict(hf_tensors(dense))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-9, err_msg=name)
    output, files = StringIO(), {GGUF_TOKENIZER: b"{}"}
    progress = Progress(stream=output)
    path = export_hf(model, tmp_path / "m", config=source.config, tokenizer_files=files, progress=progress)
    assert "copy the model's tokenizer.json" in output.getvalue() and not (path / GGUF_TOKENIZER).exists()
    for name, values in load_model(opened(path)).params.items():
        np.testing.assert_allclose(values, dense.params[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_parameters_of_every_mesh_come_back(name: str) -> None:
    """On paper: `arrange` and `restore` move rows of host arrays."""
    meshes = [(tp, ep) for tp in (1, 2, 4, 8) for ep in (1, 2, 4)]
    tried = 0
    for fused in (True, False):
        model = load(name, fused_qkv=fused)
        for tp, ep in meshes:
            parallel = ParallelConfig(tensor_parallel_size=tp, expert_parallel_size=ep)
            if why_not(model.config, parallel) is not None:
                continue
            config = cut_config(model.config, parallel)
            specs = split_model(config)[1]
            tried += 1
            for param, values in model.params.items():
                cut = arrange(np.asarray(values), specs[param].axes, config)
                assert cut.shape == specs[param].shape
                np.testing.assert_array_equal(restore(cut, specs[param].axes, config), values, err_msg=param)
            if tp == 2:
                params = {
                    p: jnp.asarray(arrange(np.asarray(v), specs[p].axes, config)) for p, v in model.params.items()
                }
                check_same(dict(hf_tensors(replace(model, config=config, params=params))), file_tensors(name))
        check_same(dict(hf_tensors(model)), file_tensors(name))
    assert tried >= 4


def test_a_part_of_a_stack_comes_back() -> None:
    config = cut_config(load("llama_gqa").config, ParallelConfig(tensor_parallel_size=8))
    values = load("llama_gqa").params["layers.attn.qkv.weight"]
    axes = split_model(config)[1]["layers.attn.qkv.weight"].axes
    cut = arrange(jnp.asarray(values), axes, config)
    assert isinstance(cut, jax.Array)
    np.testing.assert_array_equal(restore(cut[1], axes, config), values[1])


ON_DEVICES = """
import numpy as np
from llm_infer.base.progress import Progress
from llm_infer.config import ParallelConfig
from llm_infer.models.export import hf_tensors
from llm_infer.models.load import compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve

for name, tp, ep in (("gemma3_gqa", 4, 1), ("qwen3_moe_gqa", 2, 2)):
    opened = open_model(resolve(f"tests/goldens/families/{name}"))
    expected, parallel = dict(hf_tensors(load_model(opened))), ParallelConfig(tensor_parallel_size=tp, expert_parallel_size=ep)
    for stored in {None, compute_dtype("auto", "exact")[1]}:
        found = dict(hf_tensors(load_model(opened, stored=stored, parallel=parallel)))
        assert found.keys() == expected.keys()
        for tensor, values in expected.items():
            np.testing.assert_array_equal(found[tensor].astype(np.float32), values, err_msg=tensor)
print("all right")
"""


def test_over_devices() -> None:
    environment = {"PYTHONPATH": ".", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_DEVICES],
        cwd=FOLDER.parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "all right\n", done.stderr


def test_a_head_that_the_config_does_not_speak_of(tmp_path: Path) -> None:
    """The config says tied, the file has a head of its own: the exported config says what the file does."""
    source = FOLDER / "llama_gqa"
    config, tensors = json.loads((source / "config.json").read_text()), file_tensors("llama_gqa")
    assert config["tie_word_embeddings"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "lm_head.weight": -tensors["model.embed_tokens.weight"]}, tmp_path / "a/model.safetensors")
    first = opened(tmp_path / "a")
    path = export_hf(load_model(first), tmp_path / "b", config=first.config)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    check_params(load_model(opened(path)), load_model(first))


def test_the_config_of_a_repository_with_towers(tmp_path: Path) -> None:
    source = opened(FOLDER / "gemma3_gqa")
    text = source.config | {"model_type": "gemma3_text"}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    path = export_hf(load_model(source), tmp_path / "m", config=whole)
    assert json.loads((path / "config.json").read_text()) == text | {"dtype": "float32"}


def test_one_file_and_its_config(tmp_path: Path) -> None:
    source = opened(FOLDER / "llama_gqa")
    model = load_model(source)
    files = {**tokenizer_files(source), "chat_template.jinja": b"{{ messages }}"}
    path = export_hf(model, tmp_path / "m", config=None, tokenizer_files=files)
    assert sorted(f.name for f in path.iterdir()) == ["chat_template.jinja", "config.json", "model.safetensors"]
    assert json.loads((path / "config.json").read_text()) == {**source.config, "dtype": "float32"}
    check_params(load_model(opened(path)), model)
    with pytest.raises(ModelError, match="exists and is not empty"):
        export_hf(model, path, config=source.config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": None}, r"there is no config\.json of the model: give the config"),
        ({"config": None, "tokenizer_files": {"config.json": b"[]"}}, "expected a JSON object"),
        ({"config": {"architectures": ["Llama"]}}, "'Llama' is not supported"),
        ({"config": {"num_hidden_layers": 5}}, "config is that of another model: it differs in num_layers"),
        ({"config": {}, "tokenizer_files": {"../x": b""}}, r"'\.\./x' is no name of a file below"),
        ({"config": {}, "dtype": jnp.complex64}, "dtype=complex64: expected a type of floating-point numbers"),
    ],
)
def test_what_is_refused(arguments: dict, message: str, tmp_path: Path) -> None:
    source = opened(FOLDER / "llama_gqa")
    if arguments["config"] is not None:
        arguments = {**arguments, "config": source.config | arguments["config"]}
    with pytest.raises(ModelError, match=message):
        export_hf(load_model(source), tmp_path / "m", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_error_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(FOLDER / "llama_gqa")
    model = load_model(source)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_infer.weights.safetensors_writer.sync_tree", fails)
    with pytest.raises(ModelError, match=r"cannot write the model .*No space left"):
        export_hf(model, tmp_path / "m", config=source.config)
    assert not list(tmp_path.iterdir())
    gone = jnp.ones(4)
    gone.delete()
    with pytest.raises(ModelError, match=r"final_norm\.weight was deleted"):
        next(hf_tensors(replace(model, params={**model.params, "final_norm.weight": gone})))


def test_rules_that_lose_rows_are_not_undone() -> None:
    spec = {"a": np.zeros((2, 3), np.float32)}
    half = Rule("a", ("x", "y"), arrange=lambda tensors: tensors[0].repeat(2)[:2])
    with pytest.raises(ValueError, match="x, y: not every row is in one place of a"):
        undo([half], spec, lambda _: None)
