"""From a model's name to a tokenizer and a loaded model; and from there to a checkpoint that loads faster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from llm_infer.base.errors import ModelError, UserError
from llm_infer.base.progress import Progress
from llm_infer.config import ONE_DEVICE, ParallelConfig
from llm_infer.models.load import LoadedModel, ModelFiles, compute_dtype, dummy_model, dummy_source, save_model
from llm_infer.models.load import load_model as read_model
from llm_infer.models.opened import OpenModel, end_ids, open_model, tokenizer_files
from llm_infer.models.registry import family
from llm_infer.options import DEFAULT_MODEL_NAME
from llm_infer.parallel.mesh import GivenMesh, Where, over_devices
from llm_infer.text.byte_tokenizer import byte_tokenizer
from llm_infer.text.ids_only import IdsOnly
from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights.checkpoint_writer import checked_destination
from llm_infer.weights.orbax_checkpoint import DTYPES
from llm_infer.weights.sources import resolve

LOAD_FORMATS = ("auto", "dummy")


def load_model(
    name: str | os.PathLike[str] = DEFAULT_MODEL_NAME,
    *,
    weights: str = "stored",
    dtype: str = "auto",
    precision: str = "exact",
    mesh: Mesh | None = None,
    axes: Mapping[str, str] | None = None,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    max_model_len: int | None = None,
    fused_qkv: bool = True,
    skip_tokenizer_init: bool = False,
    load_format: str = "auto",
    progress: bool = True,
) -> LoadedModel:
    """Loads a model as a value: `config`, `params` (about a dozen arrays by name, each stacked over the layers), `tokenizer`.

    It can be given to `LLM.from_model` and to the functions of `llm_infer.functional`.

    Args:
        name, dtype, precision, max_model_len, fused_qkv, skip_tokenizer_init, load_format: as `model` and others of `LLM`.
        weights: "stored" keeps matrices as the file has them where kernels multiply with that; "dense" makes them arrays of
            `dtype`, which may be trained.
        mesh: devices with named axes over which the model is cut, such as a trainer's.
        axes: what each axis of `mesh` is for: "dp" (shards of the batch), "tp" (parts of every layer) or "ep" (whole experts).
            Usual names, such as "data", "fsdp", "model" and "tensor", need not be said.
        devices: just these devices, in a mesh of the sizes that follow.
        tensor_parallel_size, data_parallel_size, expert_parallel_size: as of `LLM`; not together with `mesh`.
        progress: shows what is read on stderr.

    Raises:
        UserError: the model cannot be found or loaded, or cannot be cut so.
    """
    if weights not in ("stored", "dense"):
        raise UserError(f"weights={weights!r:.60}: expected 'stored' or 'dense'")
    sizes = ParallelConfig(tensor_parallel_size, data_parallel_size, expert_parallel_size)
    if mesh is not None and (devices is not None or sizes != ONE_DEVICE):
        raise UserError("mesh: it says which devices there are and how many for what, so leave out devices and sizes")
    if axes is not None and mesh is None:
        raise UserError("axes: they say what the axes of `mesh` are for, which is not given")
    parallel: Where = sizes
    if mesh is not None:
        parallel = GivenMesh.of(mesh, axes)
    elif devices is not None:
        parallel = over_devices(sizes, list(devices))
    return load(
        name,
        load_format=load_format,
        fused_qkv=fused_qkv,
        precision=precision,
        progress=Progress(enabled=progress),
        dtype=dtype,
        weights="plain" if weights == "dense" else weights,
        max_model_len=max_model_len,
        parallel=parallel,
        skip_tokenizer_init=skip_tokenizer_init,
    )


def load(
    name: str | os.PathLike[str],
    *,
    load_format: str,
    fused_qkv: bool,
    precision: str,
    progress: Progress,
    dtype: str = "auto",
    weights: str = "stored",
    max_model_len: int | None = None,
    parallel: Where = ONE_DEVICE,
    skip_tokenizer_init: bool = False,
) -> LoadedModel:
    """Loads a model with its tokenizer as for `LLM`. A `max_model_len` that the model cannot have fails before that.

    Args:
        weights: "stored", "dense" as of `LLM`; "plain" is dense, with no kernels chosen yet (`with_kernels`).

    Raises:
        UserError: the model cannot be found or loaded, `load_format` is not one of LOAD_FORMATS, `dtype` is no type of
            weights, `precision` is not to be had here, or the model cannot be cut over the mesh of `parallel`.
    """
    name = _checked_name(name)
    compute, stored = compute_dtype(dtype, precision)
    stored = None if weights == "plain" else stored
    if load_format not in LOAD_FORMATS:
        raise UserError(f"load_format={load_format!r}: expected one of {', '.join(LOAD_FORMATS)}")
    if load_format == "dummy":
        return _dummy(name, fused_qkv, compute, stored, parallel, skip_tokenizer_init)
    opened = open_model(resolve(name, progress=progress))
    module = family(opened.config)  # an unknown architecture is the first thing to hear of
    if opened.checkpoint is None:  # whose configuration is read with the weights, which are mapped
        module.config(opened.config, fused_qkv=fused_qkv).check_context(max_model_len)
    tokenizer = None if skip_tokenizer_init else _tokenizer(opened)
    model = read_model(
        opened,
        dtype=compute,
        fused_qkv=fused_qkv,
        stored=stored,
        dense=weights == "dense",
        parallel=parallel,
        progress=progress,
        max_model_len=max_model_len,
    )
    if tokenizer is None:
        tokenizer = IdsOnly(model.config.vocab_size, end_ids(opened, model.config.vocab_size))
    files = ModelFiles(opened.config if opened.checkpoint is None else None, partial(tokenizer_files, opened))
    opened.tensors.close()
    return replace(model, tokenizer=tokenizer, files=files)


def differing_tokens(model: Tokenizer, other: Tokenizer) -> str | None:
    """Says how the tokens of another model differ from a model's; None if they are the same."""
    sizes = (model.vocab_size, other.vocab_size)
    differ = next((i for i in range(min(sizes)) if model.token_bytes(i) != other.token_bytes(i)), None)
    if differ is not None:
        return f"token {differ} differs"
    return None if sizes[0] == sizes[1] else f"it has {sizes[1]} tokens, the model has {sizes[0]}"


def require_same_tokens(target: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raises UserError if the draft model `name` has other tokens than the target: its proposals would mean nothing."""
    if (difference := differing_tokens(target, draft)) is not None:
        raise UserError(
            f"the draft model {name!r} has another vocabulary than the model ({difference}): set speculative_config['model'] "
            "to a model with the same tokenizer"
        )


def convert(
    source: str | os.PathLike[str], destination: str | Path, *, dtype: str = "float32", progress: Progress | None = None
) -> Path:
    """Writes a model as a checkpoint of stacked, fused parameters that loads without any conversion.

    Args:
        source: a model as for `LLM`.
        destination: a directory that does not exist or is empty.
        dtype: "float32", or "bfloat16" for half the size; a model that runs in another type is converted when it loads.
        progress: reports what is read and written; None is silent.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        ModelError: the source cannot be loaded, or the destination is in use or cannot be written.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    path = checked_destination(destination)
    opened = open_model(resolve(_checked_name(source), progress=progress))
    _tokenizer(opened)  # a model whose tokenizer is not supported fails here, not after minutes of writing
    files = tokenizer_files(opened)
    model = read_model(opened, dtype=DTYPES[dtype], progress=progress)
    opened.tensors.close()
    save_model(model, path, files, progress=progress)
    return path


def _checked_name(name: object) -> str:
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str) or not name:
        raise ModelError(f"model={name!r:.60}: expected the name of a model, a file or a directory")
    return name


def _dummy(
    name: str, fused_qkv: bool, dtype: DTypeLike, stored: str | None, parallel: Where, ids_only: bool
) -> LoadedModel:
    """Makes a model of random weights, with the tokenizer of its directory where there is one."""
    values, directory = dummy_source(name)
    config = family(values).config(values, fused_qkv=fused_qkv)
    model = dummy_model(config, dtype, stored=stored, parallel=parallel)
    tokenizer: Tokenizer = byte_tokenizer(config.vocab_size)
    if ids_only:
        tokenizer = IdsOnly(config.vocab_size)
    elif directory is not None and (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_hf_directory(directory)
    return replace(model, tokenizer=tokenizer)


def _tokenizer(opened: OpenModel) -> Tokenizer:
    metadata = opened.tokenizer_metadata
    if metadata is not None:
        return Tokenizer.from_gguf(metadata)
    return Tokenizer.from_hf_directory(opened.tokenizer_directory)
