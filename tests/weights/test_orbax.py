"""Orbax checkpoints: what is written loads as it was, on any mesh, and only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress
from llm_infer.loading import convert
from llm_infer.models.config import ModelConfig, MoEConfig, RopeConfig
from llm_infer.models.config_json import config_from_json, config_to_json
from llm_infer.models.families.opt import OPTConfig
from llm_infer.models.load import LoadedModel, dummy_model, load_model, save_model
from llm_infer.models.opened import open_model
from llm_infer.models.params import split_model
from llm_infer.models.registry import family
from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights import checkpoint_writer
from llm_infer.weights.orbax_checkpoint import FORMAT_VERSION, MANIFEST, Checkpoint
from llm_infer.weights.sources import ModelSource, read_json, resolve
from tests.models.family_checkpoints import FOLDER, NAMES
from tests.weights.tiny_models import CONFIG, hf_tensors

TINY = ModelConfig("LlamaForCausalLM", 64, 32, 2, 4, 2, 8, 64, 128, rope=RopeConfig(5e5, 8.0), norm_eps=1e-6)
FILES = {"tokenizer.json": b"{}", "additional_chat_templates/tool_use.jinja": "é".encode()}
GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(TINY)


@pytest.fixture(scope="module")
def written(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "new" / "checkpoint"
    save_model(model, path, FILES)
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(open_model(resolve(str(path))), **options)


def assert_equal(found: LoadedModel, expected: LoadedModel) -> None:
    assert found.config == expected.config and found.definition == expected.definition
    assert found.dtype == expected.dtype and found.params.keys() == expected.params.keys()
    for name, array in expected.params.items():
        assert found.params[name].dtype == array.dtype
        np.testing.assert_array_equal(found.params[name], array, err_msg=name)


# What is written is what loads


def test_round_trip(written: Path, model: LoadedModel) -> None:
    assert resolve(str(written)) == ModelSource(str(written), "orbax", written)
    assert_equal(load(written), model)
    opened = open_model(resolve(str(written)))
    assert {f: (opened.tokenizer_directory / f).read_bytes() for f in FILES} == FILES
    assert sorted(opened.tensors.names) == sorted(model.params)
    assert (written.stat().st_mode & 0o777) == (written.parent.stat().st_mode & 0o777)
    assert [p.name for p in written.parent.iterdir()] == ["checkpoint"]  # nothing else is left


def test_it_is_an_orbax_checkpoint(written: Path, model: LoadedModel) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in model.params}
        restored = checkpointer.restore(written / "params", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    for name, array in model.params.items():
        np.testing.assert_array_equal(restored[name], array)


def test_bfloat16(tmp_path: Path, written: Path, model: LoadedModel) -> None:
    half = replace(
        model,
        definition=split_model(TINY, jnp.bfloat16)[0],
        params={name: jnp.asarray(np.asarray(array).astype(jnp.bfloat16)) for name, array in model.params.items()},
        dtype=jnp.dtype(jnp.bfloat16),
    )
    save_model(half, tmp_path / "half", {})
    assert_equal(load(tmp_path / "half", dtype=jnp.bfloat16), half)
    wide = load(tmp_path / "half")
    assert wide.dtype == jnp.float32
    for name, array in half.params.items():
        np.testing.assert_array_equal(wide.params[name], np.asarray(array, np.float32))
    assert load(written, dtype=jnp.bfloat16).params["embed.weight"].dtype == jnp.bfloat16
    with pytest.raises(ModelError, match=r"float16: a checkpoint has one of float32, bfloat16"):
        save_model(replace(model, params={"a": jnp.zeros(4, jnp.float16)}), tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


def test_fusion_is_fixed_when_it_is_written(written: Path) -> None:
    with pytest.raises(ModelError, match=r"written with fused_qkv=True.*set fused_qkv=True"):
        load(written, fused_qkv=False)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        ModelConfig("Qwen3MoeForCausalLM", 64, 32, 2, 4, 2, 8, 64, 128, qk_norm=True, moe=MoEConfig(8, 2, 16)),
        OPTConfig("OPTForCausalLM", 64, 32, 2, 4, 4, 8, 64, 128, rope=None, pre_norm=False, embedding_size=16),
    ],
    ids=lambda config: config.architecture,
)
def test_config_round_trip(config: ModelConfig) -> None:
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize("name", NAMES)
def test_config_of_every_family_round_trip(name: str) -> None:
    values = read_json(FOLDER / name / "config.json")
    config = family(values).config(values)
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 4}, "config has unknown fields window.*newer llm_infer"),
        ({"rope": {"theta": 1e4, "yarn": 1}}, r"config\.rope has unknown fields yarn"),
        ({"rope": {"theta": "big"}}, r"config\.rope\.theta is 'big'"),
        ({"num_layers": True}, r"config\.num_layers is True"),
        ({"architecture": "NewForCausalLM"}, "'NewForCausalLM' is not supported"),
        ({"architecture": None}, "None"),
    ],
)
def test_config_of_another_version(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_json({**config_to_json(TINY), **change})
    short = config_to_json(TINY)
    del short["qk_norm"]  # added since: has a default
    assert config_from_json(short) == TINY
    del short["vocab_size"]
    with pytest.raises(ModelError, match="config has no vocab_size"):
        config_from_json(short)


# Conversion


def test_convert_a_hugging_face_directory(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    save_file(hf_tensors(), source / "model.safetensors")
    backend = Backend(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2, "b": 3}, merges=[]))
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    output = StringIO()
    path = convert(str(source), tmp_path / "dest", progress=Progress(stream=output, delay=0.0))
    assert "Loading weights: done" in output.getvalue() and "Writing checkpoint: done" in output.getvalue()
    assert_equal(load(path), load(source))
    found, expected = (Tokenizer.from_hf_directory(d) for d in (path / "tokenizer", source))
    assert found.encode("ab") == expected.encode("ab")
    assert found.eos_token_ids == expected.eos_token_ids == {2} and found.chat_template == "{{ messages }}"
    shutil.rmtree(source)
    again = convert(str(path), tmp_path / "again", dtype="bfloat16")  # a checkpoint is a source too
    assert load(again, dtype=jnp.bfloat16).params.keys() == load(path).params.keys()
    with pytest.raises(ModelError, match="dtype='int4': expected one of float32, bfloat16"):
        convert(str(path), tmp_path / "third", dtype="int4")


def test_the_destination_must_be_free(written: Path, tmp_path: Path, model: LoadedModel) -> None:
    before = (written / MANIFEST).read_bytes()
    with pytest.raises(ModelError, match="exists and is not empty: give a new directory"):
        convert("no such model", written)  # said before anything is looked for
    with pytest.raises(ModelError, match="is a file"):
        save_model(model, written / MANIFEST, {})
    assert (written / MANIFEST).read_bytes() == before
    empty = tmp_path / "empty"
    empty.mkdir()
    link = tmp_path / "link"
    link.symlink_to(empty)
    save_model(model, link, FILES)
    assert_equal(load(empty), model)
    with pytest.raises(ModelError, match="cannot write the checkpoint"):
        save_model(model, "/proc/nowhere/checkpoint", {})


# Complete or not there


@pytest.mark.parametrize("stage", ["write_files", "write_parameters", "sync_tree", "replace", "sync", "manifest"])
@pytest.mark.parametrize("killed", [False, True], ids=["error", "killed"])
def test_no_stage_leaves_something_that_loads(
    stage: str, killed: bool, tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error leaves nothing at all. A killed process is one whose cleaning up does not run."""

    def fail(*arguments: Any) -> None:
        if stage == "replace" or (stage == "manifest" and Path(arguments[1]).name == MANIFEST):
            raise OSError(28, "No space left on device")
        done = originals[stage](*arguments)
        if stage != "manifest":
            raise OSError(28, "No space left on device")
        return done

    originals = {"manifest": os.replace}
    target: Any = os if stage in ("replace", "manifest") else checkpoint_writer
    name = "replace" if stage == "manifest" else stage
    originals[stage] = getattr(target, name)
    if stage in ("replace", "manifest"):
        # Orbax renames as well: only the writer's own name is replaced.
        monkeypatch.setattr(checkpoint_writer, "os", _Os(fail))
    else:
        monkeypatch.setattr(target, name, fail)
    if killed:
        monkeypatch.setattr(checkpoint_writer.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"cannot write the checkpoint .*No space left on device"):
        save_model(model, tmp_path / "dest", FILES)
    assert killed or list(tmp_path.iterdir()) == []
    assert killed == bool(list(tmp_path.iterdir()))
    _nothing_loads(tmp_path)


class _Os:
    """The module `os` with another `replace`."""

    def __init__(self, replace: Any) -> None:
        self.replace = replace

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _nothing_loads(folder: Path) -> None:
    for directory in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        with pytest.raises(ModelError):
            open_model(resolve(str(directory)))


KILLED_MIDWAY = """
import os, signal, sys, threading, time
from pathlib import Path
import jax.numpy as jnp
import orbax.checkpoint
from llm_infer.weights.checkpoint_writer import write_checkpoint
from llm_infer.weights.default_model import directory_bytes

folder = Path(sys.argv[1])
parameters = {name: jnp.ones(10 << 20, jnp.float32) for name in "abcd"}

def kill():
    while directory_bytes(folder) < 4 << 20:
        time.sleep(0.0002)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
write_checkpoint(folder / "dest", parameters, model={}, tokenizer_files={})
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    done = _run(KILLED_MIDWAY, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "dest" / MANIFEST).exists()
    _nothing_loads(tmp_path)


# Damage


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


WEIGHT = "params/layers.mlp.down.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: _truncate(p / WEIGHT / "0.0.0"), r"0\.0\.0 has 16383 bytes, expected 16384.*damaged"),
        (lambda p: (p / WEIGHT / "0.0.0").unlink(), r"0\.0\.0 is missing.*damaged"),
        (lambda p: _truncate(p / WEIGHT / ".zarray"), r"\.zarray is not valid JSON.*damaged"),
        (lambda p: (p / WEIGHT / ".zarray").write_text("{}"), r"\.zarray: not the header of an array.*damaged"),
        (
            lambda p: _edit(p / WEIGHT / ".zarray", compressor={"id": "zstd"}),
            r"Orbax cannot restore layers\.mlp\.down.*damaged",
        ),
        (lambda p: _edit(p / WEIGHT / ".zarray", shape=[2, 64, 32]), r"missing|wrong shape"),
        (lambda p: _edit(p / WEIGHT / ".zarray", chunks=[0, 0, 0]), r"not as Orbax writes"),
        (lambda p: shutil.rmtree(p / WEIGHT), r"missing \(1\): layers\.mlp\.down\.weight"),
        (lambda p: shutil.copytree(p / WEIGHT, p / "params/extra"), r"surplus \(1\): extra"),
        (lambda p: shutil.rmtree(p / "params"), r"missing \(10\)"),
        (lambda p: _edit_model(p, intermediate_size=65), r"wrong shape \(3\).*\[2, 32, 64\] for \[2, 32, 65\]"),
        (lambda p: _edit(p / MANIFEST, dtype="bfloat16"), r"wrong type \(10\)"),
        (lambda p: _edit(p / MANIFEST, dtype="int3"), "no valid entry for 'int3'"),
        (lambda p: _edit(p / MANIFEST, version=FORMAT_VERSION + 1), r"version 2, expected at most 1.*newer"),
        (lambda p: _edit(p / MANIFEST, version="1"), r"version '1', expected a whole number"),
        (lambda p: _truncate(p / MANIFEST) or (p / MANIFEST).write_text("{"), "not valid JSON"),
        (lambda p: (p / MANIFEST).write_text("[]"), "expected a JSON object, found list"),
        (lambda p: (p / MANIFEST).write_text('{"version": 1}'), "no valid entry for 'dtype'"),
        (lambda p: (p / MANIFEST).unlink(), "interrupted `llm-infer convert` left: remove it"),
        (lambda p: (p / "tokenizer/tokenizer.json").unlink(), r"tokenizer\.json is missing.*damaged"),
        (lambda p: _truncate(p / "tokenizer/tokenizer.json"), r"tokenizer\.json has 1 bytes, expected 2"),
    ],
)
def test_damage_is_named(damage: Any, message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load(copy)


def test_other_directories(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is an Orbax checkpoint without llm_infer\.json: expected one written by"):
        resolve(str(written / "params"))
    with pytest.raises(ModelError, match=r"has no weights: expected \*\.safetensors"):
        resolve(str(tmp_path))


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _edit_model(path: Path, **changes: Any) -> None:
    _edit(path / MANIFEST, model={**json.loads((path / MANIFEST).read_text())["model"], **changes})


# Meshes

OTHER_MESHES = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from llm_infer.base.errors import ModelError
from llm_infer.models.params import split_model
from llm_infer.models.registry import family
from llm_infer.models.config import ModelConfig
from llm_infer.models.config_json import config_from_json
from llm_infer.models.load import LoadedModel, load_model, save_model
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve

source, folder = map(Path, sys.argv[1:])
assert jax.device_count() == 8
opened = open_model(resolve(str(source)))
plain = load_model(opened)
specs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in plain.params.items()}

def shardings(*shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
    spec = lambda s: P(None, "a", "b") if len(s.shape) == 3 else P(*[None] * (len(s.shape) - 1), ("a", "b"))
    return {name: NamedSharding(mesh, spec(s)) for name, s in specs.items()}

def check(params, wanted):
    for name, array in params.items():
        assert wanted is None or array.sharding == wanted[name], name
        assert len(array.sharding.device_set) == (1 if wanted is None else 8)
        np.testing.assert_array_equal(array, plain.params[name], err_msg=name)

eight = shardings(2, 4)
spread = opened.checkpoint.restore(specs, shardings=eight)       # from one device to eight
check(spread, eight)
save_model(LoadedModel(plain.config, plain.definition, spread, plain.dtype), folder / "eight", {})
stored = open_model(resolve(str(folder / "eight"))).checkpoint
assert stored.array("embed.weight").chunks == (64, 4) and stored.array("embed.weight").single_file is None
check(stored.restore(specs), None)                               # from eight back to one
other = shardings(8, 1)
check(stored.restore(specs, shardings=other), other)             # from eight to eight in another order
check(load_model(open_model(resolve(str(folder / "eight")))).params, None)
(folder / "eight/params/embed.weight/0.2").unlink()
try:
    open_model(resolve(str(folder / "eight"))).checkpoint.restore(specs)
except ModelError as error:
    assert "0.2 is missing" in str(error)
else:
    raise AssertionError("a missing chunk was taken for zeros")
print("all right")
"""


def test_any_mesh(written: Path, tmp_path: Path) -> None:
    done = _run(OTHER_MESHES, written, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.stdout == "all right\n", done.stderr


def _run(script: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent.parent
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# The default model


def test_the_default_models_tokenizer_loses_nothing(default_gguf: Path, tmp_path: Path, model: LoadedModel) -> None:
    """Only the weights are those of a tiny model here."""
    from llm_infer.llm import LLM
    from llm_infer.models.opened import tokenizer_files

    source = open_model(resolve(str(default_gguf)))
    save_model(
        dummy_model(ModelConfig("LlamaForCausalLM", 49152, 8, 1, 1, 1, 8, 8, 64)),
        tmp_path / "d",
        tokenizer_files(source),
    )
    assert source.gguf is not None
    expected = Tokenizer.from_gguf(source.gguf.metadata)
    found = LLM(str(tmp_path / "d"), max_num_seqs=2, max_num_batched_tokens=16, progress=False).tokenizer
    goldens = json.loads((GOLDENS / "tokenizer_llamacpp.json").read_text())
    texts = [*goldens["texts"], *(GOLDENS / "prompts.txt").read_text().splitlines()]
    for text in texts:
        for special in (True, False):
            assert found.encode(text, parse_special=special) == expected.encode(text, parse_special=special)
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "eos_token_ids", "special_tokens", "chat_templates"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.chat_template and all(found.token_bytes(i) == expected.token_bytes(i) for i in range(0, 49152, 7))


def test_a_mapped_model_takes_no_memory_of_its_own(written: Path) -> None:
    """On the CPU, parameters are the files: JAX's arrays lie at the start of pages."""
    params = Checkpoint(written).restore(
        {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in load(written).params.items()}
    )
    assert all(a.unsafe_buffer_pointer() % 4096 == 0 for a in params.values())


def _manifest(path: Path, **changes: Any) -> None:
    content = json.loads((path / MANIFEST).read_text())
    content["model"] |= changes.pop("model", {})
    (path / MANIFEST).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": -1}}, r"config\.vocab_size is -1, expected a positive number"),
        ({"model": {"hidden_size": 0}}, r"config\.hidden_size is 0, expected a positive number"),
        ({"model": {"hidden_size": 2**70}}, r"config\.hidden_size is \d+, expected a positive number"),
        ({"model": {"num_kv_heads": 0}}, r"config\.num_kv_heads is 0, expected a positive number"),
        ({"model": {"norm_eps": 2.0}}, r"config\.norm_eps is 2\.0, expected at most 1"),
        ({"model": {"norm_eps": float("nan")}}, r"config\.norm_eps is nan, expected a positive number"),
        ({"model": {"qkv_bias": "é" * 9999}}, r"config\.qkv_bias is 'é+, expected"),
        ({"model": {"num_heads": 8}}, r"; wrong shape \(2\): layers"),
        ({"tokenizer": {"../secret": 1}}, r"'\.\./secret'\]=1, expected files below"),
        ({"tokenizer": {"/etc/passwd": 1}}, r"'/etc/passwd'\]=1, expected files below"),
        ({"tokenizer": {"tokenizer.json": 1e308}}, r"=1e\+308, expected files below"),
        ({"version": "é" * 9999}, "version 'é+, expected a whole number"),
    ],
)
def test_a_manifest_of_impossible_values(copy: Path, changes: dict[str, Any], message: str) -> None:
    _manifest(copy, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
