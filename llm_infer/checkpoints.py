"""Weights from and to other programs: Hugging Face directories, Orbax checkpoints, trees of NNX and Linen. These names stay.

export_hf(model, "directory")                            # what transformers, vLLM and llm_infer load
save(model, "directory")                                 # an Orbax checkpoint that loads without converting
llm.update_weights(read_orbax("checkpoint"))             # any Orbax checkpoint of a tree
llm.update_weights(from_tree(state, TUNIX_QWEN3, model.config))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress
from llm_infer.models import export, fused
from llm_infer.models.export import hf_tensors, on_host
from llm_infer.models.import_tree import from_tree
from llm_infer.models.load import LoadedModel, save_model
from llm_infer.models.new_weights import whole_config
from llm_infer.models.params import split_model
from llm_infer.models.sharded import restore
from llm_infer.models.tree_names import TUNIX_GEMMA3, TUNIX_LLAMA3, TUNIX_QWEN2, TUNIX_QWEN3
from llm_infer.quant import StoredWeights
from llm_infer.weights.orbax_reading import read_orbax

__all__ = [
    "TUNIX_GEMMA3",
    "TUNIX_LLAMA3",
    "TUNIX_QWEN2",
    "TUNIX_QWEN3",
    "export_hf",
    "from_tree",
    "fuse",
    "hf_tensors",
    "read_orbax",
    "save",
    "unfuse",
]


def export_hf(
    model: LoadedModel,
    destination: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    progress: bool = True,
) -> Path:
    """Writes a directory as Hugging Face has them: safetensors, config.json and the tokenizer's files.

    Matrices in blocks are dequantised, and a model that is cut over a mesh is written whole.

    Args:
        model: a model; it may be running.
        destination: a directory that does not exist or is empty.
        config: for config.json; by default what the model was loaded with.
        dtype: of all tensors; by default float32 for matrices in blocks, else the model's.
        progress: shows on stderr what is written.

    Returns:
        The absolute path of the directory.

    Raises:
        ModelError: the destination is in use or cannot be written, or there is no config, as of a model that nothing was read of.
    """
    files = model.files
    return export.export_hf(
        model,
        destination,
        config=config if config is not None or files is None else files.config,
        tokenizer_files=None if files is None else files.tokenizer(),
        dtype=dtype,
        progress=Progress(enabled=progress),
    )


def save(model: LoadedModel, destination: str | Path, *, progress: bool = True) -> Path:
    """Writes an Orbax checkpoint that `LLM` and `load_model` load without converting anything.

    Args:
        model: with plain arrays, as `load_model(…, weights="dense")` gives; it may be running, and cut over a mesh.
        destination: a directory that does not exist or is empty.
        progress: shows on stderr what is written.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        ModelError: matrices are in blocks, or the destination is in use or cannot be written.
    """
    if model.config.own is not None:
        raise ModelError("a registered model is no file's: save its parameters by Orbax, and read them by read_orbax")
    if blocks := [name for name, value in model.params.items() if isinstance(value, StoredWeights)]:
        raise ModelError(
            f"{blocks[0]} is in blocks of its file: load the model with weights='dense' to save it, or use export_hf"
        )
    if model.mesh is not None:
        specs = split_model(model.config, model.dtype)[1]
        whole = {n: restore(on_host(n, value), specs[n].axes, model.config) for n, value in model.params.items()}
        model = replace(model, params=whole, config=whole_config(model.config), mesh=None)
    tokenizer = {} if model.files is None else model.files.tokenizer()
    save_model(model, destination, tokenizer, progress=Progress(enabled=progress))
    return Path(destination).absolute()


def fuse(model: LoadedModel) -> LoadedModel:
    """Returns the model with query, key and value projections in one matrix; the rest is taken by reference.

    Raises:
        ModelError: they are in blocks of different kinds.
    """
    return _with(model, *fused.fuse(model.params, model.config))


def unfuse(model: LoadedModel) -> LoadedModel:
    """Returns the model with a matrix each for query, key and value projections: undoes `fuse`.

    Raises:
        ModelError: they are in blocks whose rows cannot be moved.
    """
    return _with(model, *fused.unfuse(model.params, model.config))


def _with(model: LoadedModel, params: Any, config: Any) -> LoadedModel:
    return replace(model, params=params, config=config, definition=split_model(config, model.dtype)[0])
