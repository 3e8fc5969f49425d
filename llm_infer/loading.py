"""From a model's name to a tokenizer and a loaded model; and from there to a checkpoint that loads faster."""

from __future__ import annotations

import os
from pathlib import Path

from jax.typing import DTypeLike

from llm_infer.base.errors import ModelError, UserError
from llm_infer.base.progress import Progress
from llm_infer.config import ONE_DEVICE, ParallelConfig
from llm_infer.models.load import LoadedModel, compute_dtype, dummy_model, dummy_source, load_model, save_model
from llm_infer.models.opened import OpenModel, open_model, tokenizer_files
from llm_infer.models.registry import family
from llm_infer.text.byte_tokenizer import byte_tokenizer
from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights.checkpoint_writer import checked_destination
from llm_infer.weights.orbax_checkpoint import DTYPES
from llm_infer.weights.sources import resolve

LOAD_FORMATS = ("auto", "dummy")


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
    parallel: ParallelConfig = ONE_DEVICE,
) -> tuple[Tokenizer, LoadedModel]:
    """Loads tokenizer and model of a name as for `LLM`. A `max_model_len` that the model cannot have fails before that.

    Raises:
        UserError: the model cannot be found or loaded, `load_format` is not one of LOAD_FORMATS, `dtype` is no type of
            weights, `precision` is not to be had here, or the model cannot be cut over the mesh of `parallel`.
    """
    name = _checked_name(name)
    compute, stored = compute_dtype(dtype, precision)
    if load_format not in LOAD_FORMATS:
        raise UserError(f"load_format={load_format!r}: expected one of {', '.join(LOAD_FORMATS)}")
    if load_format == "dummy":
        return _dummy(name, fused_qkv, compute, stored, parallel)
    opened = open_model(resolve(name, progress=progress))
    module = family(opened.config)  # an unknown architecture is the first thing to hear of
    if opened.checkpoint is None:  # whose configuration is read with the weights, which are mapped
        module.config(opened.config, fused_qkv=fused_qkv).check_context(max_model_len)
    tokenizer = _tokenizer(opened)
    model = load_model(
        opened,
        dtype=compute,
        fused_qkv=fused_qkv,
        stored=stored,
        dense=weights == "dense",
        parallel=parallel,
        progress=progress,
        max_model_len=max_model_len,
    )
    opened.tensors.close()
    return tokenizer, model


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
    model = load_model(opened, dtype=DTYPES[dtype], progress=progress)
    opened.tensors.close()
    save_model(model, path, files, progress=progress)
    return path


def _checked_name(name: object) -> str:
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str) or not name:
        raise ModelError(f"model={name!r:.60}: expected the name of a model, a file or a directory")
    return name


def _dummy(
    name: str, fused_qkv: bool, dtype: DTypeLike, stored: str | None, parallel: ParallelConfig
) -> tuple[Tokenizer, LoadedModel]:
    """Makes a model of random weights, with the tokenizer of its directory where there is one."""
    values, directory = dummy_source(name)
    config = family(values).config(values, fused_qkv=fused_qkv)
    model = dummy_model(config, dtype, stored=stored, parallel=parallel)
    if directory is not None and (directory / "tokenizer.json").is_file():
        return Tokenizer.from_hf_directory(directory), model
    return byte_tokenizer(config.vocab_size), model


def _tokenizer(opened: OpenModel) -> Tokenizer:
    metadata = opened.tokenizer_metadata
    if metadata is not None:
        return Tokenizer.from_gguf(metadata)
    return Tokenizer.from_hf_directory(opened.tokenizer_directory)
