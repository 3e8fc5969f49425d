"""Models of the Hugging Face hub: the files that are needed, into the hub's own cache, with errors one can act on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_infer.base.environment import offline_variable
from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress, Task
from llm_infer.weights.default_model import directory_bytes

# Weights, configs, tokenizer, chat template; nothing of subdirectories (other formats), no second copy of the weights.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
UNWANTED = ["*/*", "consolidated*", "adapter_*"]

_CONNECT_SECONDS = 5.0
_LOCAL_OPTIONS = "give the path of a local GGUF file or Hugging Face directory instead, or the built-in default model"


def fetch_from_hub(repo_id: str, progress: Progress) -> Path:
    """Directory with the files of a hub model, downloaded unless they are in the hub's cache already.

    Without a network a complete earlier download is used.

    Raises:
        ModelError: the hub cannot be reached and the cache has no complete copy; no such model or no access; the model
            has no safetensors weights.
    """
    import huggingface_hub  # one second to import: only paid by those who use the hub
    from huggingface_hub import errors, utils

    # The base of all transport errors; it belongs to the HTTP library, which differs between versions of the hub's.
    transport_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]

    if setting := offline_variable():
        return _cached(repo_id, f"{setting} forbids network use")
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, files_metadata=True, timeout=_CONNECT_SECONDS)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = list(utils.filter_repo_objects(sizes, allow_patterns=WANTED, ignore_patterns=UNWANTED))
        _require_safetensors(repo_id, list(sizes), wanted)
        total = sum(sizes[name] for name in wanted)
        blobs = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
        with (
            progress.task(f"Fetching {repo_id} from the Hugging Face hub", total=total, unit="bytes") as task,
            _watch(blobs, task),
        ):
            return Path(_snapshot(repo_id, local_files_only=False))
    except errors.GatedRepoError:
        raise ModelError(
            f"hub model {repo_id!r} is gated: accept its licence on https://huggingface.co/{repo_id} and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"no local path {repo_id!r} and no such model on the Hugging Face hub (a private one needs HF_TOKEN)"
        ) from None
    except errors.HFValidationError:
        raise ModelError(f"{repo_id!r} is neither a local path nor a valid Hugging Face hub id") from None
    except (transport_error, OSError) as error:  # unreachable, or it answers with an error of its own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return _cached(repo_id, f"the Hugging Face hub cannot be reached ({reason[:200]})")


def _snapshot(repo_id: str, *, local_files_only: bool) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """Progress is shown from the bytes on disk, in our own way."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return snapshot_download(
        repo_id,
        allow_patterns=WANTED,
        ignore_patterns=UNWANTED,
        local_files_only=local_files_only,
        tqdm_class=Silent,
    )


def _cached(repo_id: str, why_not_online: str) -> Path:
    from huggingface_hub import errors

    try:
        return Path(_snapshot(repo_id, local_files_only=True))
    except errors.HFValidationError:
        raise ModelError(f"{repo_id!r} is neither a local path nor a valid Hugging Face hub id") from None
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"no local path {repo_id!r}, {why_not_online}, and its cache has no complete copy of the model: "
            f"{_LOCAL_OPTIONS}"
        ) from None


def _require_safetensors(repo_id: str, names: list[str], wanted: list[str]) -> None:
    if any(name.endswith(".safetensors") for name in wanted):
        return
    if any(name.endswith(".gguf") for name in names):
        raise ModelError(f"hub model {repo_id!r} holds GGUF files: download one of them and give its path")
    raise ModelError(
        f"hub model {repo_id!r} has no safetensors weights: choose one that has; pickled weights (.bin, .pt) are never "
        "loaded because they can run code"
    )


@contextmanager
def _watch(directory: Path, task: Task) -> Iterator[None]:
    """Report the bytes below `directory` every 0.2 s while the block runs."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.2):
            task.set(directory_bytes(directory))

    thread = threading.Thread(target=poll, name="hub-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
