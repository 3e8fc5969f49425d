"""Models that downloads have left on this machine: which there are, how large they are, and their removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_infer.base.environment import cache_dir
from llm_infer.base.errors import ModelError
from llm_infer.base.files import is_there
from llm_infer.weights import default_model
from llm_infer.weights.gguf_choice import gguf_models, labels
from llm_infer.weights.hub import WANTED, hub_cache
from llm_infer.weights.model_names import HubName, hub_name, why_unknown

UNFINISHED = "not complete"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        name: as for `--model`, `pull` and `rm`.
        num_bytes: size of its files. Models may share some.
        directory: where its files are, below the cache.
        modified: when its last file was written, in seconds since 1970.
        note: what else there is to say.
        files: path of each file → where its content is (in the hub's cache, elsewhere).
    """

    name: str
    num_bytes: int
    directory: Path
    modified: float
    note: str = ""
    files: dict[Path, Path] = field(default_factory=dict)


def local_models() -> list[LocalModel]:
    """Returns the models in our cache and in the hub's, by name; what an interrupted download left counts, too."""
    found = [*_default(), *_hub()]
    return sorted(found, key=lambda model: model.name.lower())


def total_bytes(models: list[LocalModel]) -> int:
    """Returns the size of several models, with files that some of them share counted once."""
    return sum(path.stat().st_size for path in {content for model in models for content in model.files.values()})


def found_by(name: str, models: list[LocalModel]) -> list[LocalModel]:
    """Returns the models that a name means: of `org/name` all types and revisions, of `org/name:TYPE` all revisions.

    Raises:
        ModelError: there is none.
    """
    asked = hub_name(name)
    found = [model for model in models if model.name == name or (asked is not None and _includes(asked, model))]
    if found:
        return found
    if is_there(name):
        raise ModelError(f"{name!r} is a path: this command removes downloads only (see `llm-infer list`)")
    if asked is None and (problem := why_unknown(name)) is not None:
        raise ModelError(f"{problem} (`llm-infer list` shows what is here)")
    raise ModelError(f"model {name!r} is not on this machine (`llm-infer list` shows what is)")


def remove(models: list[LocalModel]) -> None:
    """Removes models, and what only they need; content that others share stays.

    Raises:
        ModelError: one came with an installed package, or a file cannot be removed.
    """
    for model in models:
        if not model.directory.is_relative_to(cache_dir()) and hub_name(model.name) is None:
            package = default_model.DEFAULT_MODEL.distribution
            raise ModelError(f"model {model.name!r} belongs to an installed package: run `pip uninstall {package}`")
    try:
        for directory in {model.directory for model in models}:
            _remove(
                directory, {k: v for model in models if model.directory == directory for k, v in model.files.items()}
            )
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be removed: {error.strerror}") from None


def _remove(directory: Path, files: dict[Path, Path]) -> None:
    """Removes files of a directory, or of a repository of the hub's cache, and what nobody else needs.

    Other snapshots stay, and so do files of other formats, and content that no snapshot shows yet: another program may
    have just fetched it.
    """
    contents = {content.resolve() for content in files.values()}
    for path in files:
        path.unlink(missing_ok=True)
    snapshots = directory / "snapshots"
    for name in {path.relative_to(snapshots).parts[0] for path in files if path.is_relative_to(snapshots)}:
        snapshot = snapshots / name
        left = [path for path in snapshot.rglob("*") if not path.is_dir()]
        if all(path.suffix in _SMALL or path.name in _SMALL for path in left):
            contents |= {path.resolve() for path in left}
            shutil.rmtree(snapshot)
            for reference in directory.glob("refs/**/*"):
                if reference.is_file() and reference.read_text().strip() == name:
                    reference.unlink()
    shown = {path.resolve() for path in directory.glob("snapshots/**/*")}
    for blob in directory.glob("blobs/*"):
        if blob.resolve() in contents - shown:
            blob.unlink()
    left = [path for path in directory.rglob("*") if not path.is_dir()]
    if all(_BOOKS & set(path.relative_to(directory).parts) for path in left):
        shutil.rmtree(directory)


_SMALL = (".json", ".jinja", ".txt", ".model", ".md", ".gitattributes", "LICENSE")
"""Endings and names of files that mean nothing without weights."""

_BOOKS = {"refs", "trees", ".no_exist"}
"""Folders of a repository in the hub's cache that hold no content."""


def _includes(asked: HubName, model: LocalModel) -> bool:
    """Says whether a name means this model, whose own name may say more."""
    one = hub_name(model.name)
    if one is None or one.repo_id != asked.repo_id:
        return False
    if asked.revision not in (None, one.revision or "main"):
        return False
    return asked.quantisation is None or asked.quantisation.upper() == (one.quantisation or "").upper()


def _default() -> Iterator[LocalModel]:
    pinned = default_model.DEFAULT_MODEL
    if (path := default_model.find(pinned)) is not None:
        yield LocalModel(pinned.name, pinned.file_bytes, path.parent, path.stat().st_mtime, "default", {path: path})


def _hub() -> Iterator[LocalModel]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except (CacheNotFound, ValueError):  # nothing has been downloaded yet, or a file is in its place
        return
    for repo in repositories:
        for revision in repo.revisions:
            references = sorted(revision.refs)
            reference = None if "main" in references else references[0] if references else revision.commit_hash
            yield from _revision(HubName(repo.repo_id, reference), repo.repo_path, revision)
    for repository in sorted(hub_cache().glob("models--*--*")):
        if unfinished := {path: path for path in repository.glob("blobs/*.incomplete")}:
            name = repository.name.removeprefix("models--").replace("--", "/", 1)
            yield _model(name, repository, unfinished, UNFINISHED)


def _revision(name: HubName, repository: Path, revision: Any) -> Iterator[LocalModel]:
    """Yields the GGUF models of a revision, and its safetensors model."""
    contents = {file.file_path.relative_to(revision.snapshot_path).as_posix(): file for file in revision.files}
    models = gguf_models({path: file.size_on_disk for path, file in contents.items()})
    for label, model in zip(labels(models), models, strict=True):
        files = {contents[path].file_path: contents[path].blob_path for path in model.files}
        yield _model(
            str(HubName(name.repo_id, name.revision, label)), repository, files, UNFINISHED * bool(model.missing)
        )
    if any(path.endswith(".safetensors") for path in contents):
        kept = tuple(pattern.removeprefix("*") for pattern in WANTED)
        files = {file.file_path: file.blob_path for path, file in contents.items() if path.endswith(kept)}
        yield _model(str(name), repository, files)


def _model(name: str, repository: Path, files: dict[Path, Path], note: str = "") -> LocalModel:
    stats = [content.stat() for content in files.values()]
    total, modified = sum(one.st_size for one in stats), max(one.st_mtime for one in stats)
    return LocalModel(name, total, repository, modified, note, files)
