"""Models of the Hugging Face hub: the files that are needed, into the hub's own cache, with errors one can act on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llm_infer.base.environment import offline_variable
from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress
from llm_infer.base.sizes import size
from llm_infer.weights.gguf_choice import choose, gguf_models
from llm_infer.weights.hub_download import Download, download_all
from llm_infer.weights.model_names import HubName

# Weights, configs, tokenizer, chat template; nothing of subdirectories (other formats), no second copy of the weights.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
UNWANTED = ["*/*", "consolidated*", "adapter_*"]

_CONNECT_SECONDS = 5.0
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOCAL_OPTIONS = "give the path of a local GGUF file or Hugging Face directory instead, or the built-in default model"


@dataclass(frozen=True, slots=True)
class HubModel:
    """A hub model whose files are on this machine.

    Attributes:
        name: the model, with the type of GGUF file that was chosen.
        kind: how it is stored.
        path: the GGUF file (of several parts the first), or the directory.
        files: its files.
        num_bytes: size of all of them.
        unchecked: names of files of which the hub gives no hash to compare.
    """

    name: HubName
    kind: Literal["gguf", "huggingface"]
    path: Path
    files: tuple[Path, ...]
    num_bytes: int
    unchecked: tuple[str, ...] = ()


def fetch_from_hub(name: HubName, progress: Progress) -> HubModel:
    """Returns a hub model's files, downloaded unless they are in the hub's cache already.

    A download that was interrupted goes on where it stopped. Without a network a complete earlier one is used.

    Raises:
        ModelError: the hub cannot be reached and the cache has no complete copy; no such model, revision or type, or no
            access; the model has neither safetensors weights nor GGUF files; a file arrives damaged or cannot be stored.
    """
    from huggingface_hub import errors  # one second to import: only paid by those who use the hub

    # The base of all transport errors; it belongs to the HTTP library, which differs between versions of the hub's.
    transport_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    repo_id = name.repo_id
    if setting := offline_variable():
        return _cached(name, f"{setting} forbids network use")
    try:
        return _fetch(name, progress)
    except errors.GatedRepoError:
        raise ModelError(
            f"hub model {repo_id!r} is gated: accept its licence on https://huggingface.co/{repo_id} and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"no local path {repo_id!r} and no such model on the Hugging Face hub (a private one needs HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"hub model {repo_id!r} has no revision {name.revision!r}: give a branch, tag or commit"
        ) from None
    except errors.HFValidationError:
        raise ModelError(f"{repo_id!r} is neither a local path nor a valid Hugging Face hub id") from None
    except (transport_error, OSError) as error:  # unreachable, or it answers with an error of its own
        if isinstance(error, OSError) and not isinstance(error, transport_error) and error.errno is not None:
            raise ModelError(
                f"hub model {repo_id!r} cannot be stored in {hub_cache()} ({error.strerror}): set HF_HOME to another directory"
            ) from None
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return _cached(name, f"the Hugging Face hub cannot be reached ({reason[:200]})")


def _fetch(name: HubName, progress: Progress) -> HubModel:
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(
        name.repo_id, revision=name.revision, files_metadata=True, timeout=_CONNECT_SECONDS
    )
    files = {file.rfilename: file for file in info.siblings or ()}
    sizes = {path: file.size or 0 for path, file in files.items()}
    name, wanted = _choice(name, sizes)
    repository = _repository_directory(name.repo_id)
    hashes = {path: _hash_of(files[path]) for path in wanted}
    missing = [path for path in wanted if not (repository / "snapshots" / str(info.sha) / path).exists()]
    _require_room(name, repository, sum(sizes[path] for path in missing))
    with progress.task(f"Fetching {name}", total=sum(sizes[path] for path in missing), unit="bytes") as task:
        locks = repository.parent / ".locks" / repository.name
        download_all(
            [
                Download(
                    huggingface_hub.hf_hub_url(name.repo_id, path, revision=info.sha),
                    repository / "blobs" / found,
                    locks / f"{found}.lock",
                    path,
                    sizes[path],
                )
                for path in missing
                if (found := hashes[path]) is not None
            ],
            task,
        )
        directory = Path(_snapshot(name, wanted, local_files_only=False))
    if directory.name != info.sha:
        raise ModelError(f"hub model {name} changed while it was fetched: run the same command again")
    unchecked = tuple(path for path in wanted if hashes[path] is None)
    return replace(_model(name, directory, wanted), unchecked=unchecked)


def _choice(name: HubName, sizes: dict[str, int]) -> tuple[HubName, list[str]]:
    """Returns the name with its type of GGUF file, if it means one, and the files that it needs."""
    from huggingface_hub import utils

    wanted = list(utils.filter_repo_objects(sizes, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    if name.quantisation is None and any(path.endswith(".safetensors") for path in wanted):
        return name, wanted
    models = gguf_models(sizes)
    if not models and name.quantisation is None:
        raise ModelError(
            f"hub model {name.repo_id!r} has no safetensors weights and no GGUF files: choose one that has; pickled weights "
            "(.bin, .pt) are never loaded because they can run code"
        )
    found = choose(models, name.quantisation, name.repo_id)
    return replace(name, quantisation=name.quantisation or found.quantisation), list(found.files)


def _hash_of(file: Any) -> str | None:
    """Returns what the hub's cache calls the file: SHA-256 of large files, git's SHA-1 of others."""
    lfs = file.lfs
    found = file.blob_id if lfs is None else lfs.sha256
    return found if found is not None and file.size is not None and _HASH.fullmatch(found) else None


def _model(name: HubName, directory: Path, wanted: Iterable[str]) -> HubModel:
    files = tuple(directory / path for path in wanted)
    total = sum(file.stat().st_size for file in files)
    if name.quantisation is None:
        return HubModel(name, "huggingface", directory, files, total)
    return HubModel(name, "gguf", files[0], files, total)


def hub_cache() -> Path:
    """Returns the hub's cache, which need not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repository_directory(repo_id: str) -> Path:
    return hub_cache() / f"models--{repo_id.replace('/', '--')}"


def _require_room(name: HubName, directory: Path, num_bytes: int) -> None:
    """Raises ModelError if a download cannot fit; what an interrupted one has left counts as room."""
    here = next(path for path in (directory, *directory.parents) if path.is_dir())
    begun = sum(file.stat().st_size for file in directory.glob("blobs/*.incomplete"))
    free = shutil.disk_usage(here).free + begun
    if free < num_bytes:
        raise ModelError(
            f"hub model {name} needs {size(num_bytes)}, and {directory.parent} has room for {size(free)}: remove models with "
            "`llm-infer rm`, or set HF_HOME to another directory"
        )


def _snapshot(name: HubName, wanted: list[str] | None, *, local_files_only: bool) -> str:
    """Has the hub's library enter the files in its cache (and fetch those that are not there), and returns the directory."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """Progress is shown from the bytes that arrive, in our own way."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return snapshot_download(
        name.repo_id,
        revision=name.revision,
        allow_patterns=WANTED if wanted is None else wanted,
        ignore_patterns=UNWANTED if wanted is None else None,
        local_files_only=local_files_only,
        tqdm_class=Silent,
    )


def _cached(name: HubName, why_not_online: str) -> HubModel:
    """Returns what the cache has of a model.

    Raises:
        ModelError: it has no complete copy.
    """
    from huggingface_hub import errors

    absent = f"no local path {str(name)!r}, {why_not_online}, and its cache has no complete copy of the model: {_LOCAL_OPTIONS}"
    directory = _cached_directory(name)
    if directory is None:
        raise ModelError(absent)
    sizes = {
        path.relative_to(directory).as_posix(): path.stat().st_size for path in directory.rglob("*") if path.is_file()
    }
    try:
        chosen, wanted = _choice(name, sizes)
        if chosen.quantisation is None:
            _snapshot(name, None, local_files_only=True)  # which knows whether all files are here
    except errors.HFValidationError:
        raise ModelError(f"{name.repo_id!r} is neither a local path nor a valid Hugging Face hub id") from None
    except (errors.LocalEntryNotFoundError, ModelError) as error:
        if isinstance(error, ModelError) and gguf_models(sizes):
            raise ModelError(f"{error}; {why_not_online}") from None
        raise ModelError(absent) from None
    return _model(chosen, directory, wanted)


def _cached_directory(name: HubName) -> Path | None:
    """Returns the snapshot of a revision in the hub's cache: of a commit, or of that which a branch or tag named last."""
    repository = _repository_directory(name.repo_id)
    reference = repository / "refs" / (name.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else name.revision
    directory = repository / "snapshots" / str(commit)
    return directory if commit and directory.is_dir() else None
