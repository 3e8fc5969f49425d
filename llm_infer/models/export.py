"""Gives a model's weights under Hugging Face's names, as its files have them, and writes them as such a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress
from llm_infer.models.hf_layout import undoings
from llm_infer.models.load import LoadedModel
from llm_infer.models.new_weights import whole_config
from llm_infer.models.opened import GGUF_TOKENIZER
from llm_infer.models.params import refuse_absent, split_model
from llm_infer.models.registry import family
from llm_infer.models.sharded import restore
from llm_infer.models.text_part import text_class, text_config
from llm_infer.parallel.axes import Axes
from llm_infer.quant import StoredWeights
from llm_infer.weights.safetensors_writer import SHARD_BYTES, TensorSpec, write_directory
from llm_infer.weights.undo_rules import Undo
from pallas_kernels.quant_matmul import FORMATS, dequantise, untile

CONFIG = "config.json"


def hf_tensors(model: LoadedModel, *, dtype: DTypeLike | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of a model under the name that Hugging Face's files have for it, in their shape.

    Matrices in blocks are dequantised, and a model that is cut over a mesh is brought back. No more than one parameter is
    held, and what is made of it.

    Args:
        model: a model; it may be running.
        dtype: type of all tensors; None for that of each parameter: of weights in blocks float32, of norms whose scales
            are stored less one the model's.

    Raises:
        ModelError: weights were given up or deleted, or are on devices of other hosts.
    """
    refuse_absent(model.params)
    axes = {name: spec.axes for name, spec in split_model(model.config, model.dtype)[1].items()}
    for each in undoings(model.config, model.dtype):
        values = [_Values(model, name, axes[name]) for name in each.params]
        for layer, names in enumerate(each.groups(model.config.num_layers)):
            of_layer = [value.layer(layer if each.stacked else None) for value in values]
            chosen = _dtype(model, each, layer, dtype)
            for name, array in zip(names, each.make(of_layer), strict=True):
                yield name, array.astype(chosen, copy=False)


def hf_specs(model: LoadedModel, *, dtype: DTypeLike | None = None) -> list[TensorSpec]:
    """Describes what `hf_tensors` yields, in the same order; no weight is read."""
    specs = split_model(whole_config(model.config), model.dtype)[1]
    found = []
    for each in undoings(model.config, model.dtype):
        shapes = each.shapes(specs)
        for layer, names in enumerate(each.groups(model.config.num_layers)):
            chosen = _dtype(model, each, layer, dtype)
            found += [TensorSpec(name, shape, chosen) for name, shape in zip(names, shapes, strict=True)]
    return found


def export_hf(
    model: LoadedModel,
    destination: str | Path,
    *,
    config: Mapping[str, Any] | None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes a directory that Hugging Face's libraries and this one load: safetensors, config.json and the tokenizer's files.

    It is there complete or not at all.

    Args:
        model: a model; it may be running.
        destination: a directory that does not exist or is empty.
        config: what its config.json said (`OpenModel.config`); None takes the one among `tokenizer_files`.
        tokenizer_files: relative path → content, as `models.opened.tokenizer_files` returns them.
        dtype: see `hf_tensors`.
        shard_bytes: most bytes of tensors in one file; more make several files and an index.
        progress: reports bytes written; None is silent.

    Returns:
        The absolute path of the directory.

    Raises:
        ModelError: the destination is in use or cannot be written, there is no config or one of another model, or as
            `hf_tensors`.
    """
    refuse_absent(model.params)
    files = dict(tokenizer_files or {})
    found = files.pop(CONFIG, None)
    if config is None:
        if found is None:
            raise ModelError(f"there is no {CONFIG} of the model: give the config that it was loaded with")
        config = _parsed(found)
    specs = hf_specs(model, dtype=dtype)
    written = _written_config(model, config, specs)
    if files.pop(GGUF_TOKENIZER, None) is not None:
        note = "the tokenizer is that of a GGUF file, which is not written: copy the model's tokenizer.json beside its weights"
        (progress or Progress.silent()).note(note)
    files[CONFIG] = (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()
    tensors = hf_tensors(model, dtype=dtype)
    return write_directory(destination, specs, tensors, files, shard_bytes=shard_bytes, progress=progress)


class _Values:
    """One parameter as host arrays of a whole model, layer by layer."""

    def __init__(self, model: LoadedModel, name: str, axes: Axes) -> None:
        self._name, self._axes, self._config = name, axes, model.config
        value = model.params[name]
        # All layers at once where they are plain: on one device of this host nothing is copied.
        self._value = value if isinstance(value, StoredWeights) else self._restored(on_host(name, value))

    def _restored(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(restore(array, self._axes, self._config))

    def layer(self, layer: int | None) -> np.ndarray:
        """Returns one layer; all there is for None."""
        if not isinstance(self._value, StoredWeights):
            return self._value if layer is None else self._value[layer]
        stack, index = self._value.places[layer or 0]
        kind, tiled, blocks = self._value.kinds[stack], self._value.is_tiled(stack), self._value.blocks[stack]
        return self._restored(on_host(self._name, _plain(blocks, index, kind, tiled)))


@partial(jax.jit, static_argnames=("kind", "tiled"))
def _plain(blocks: Array, index: Array | int, kind: str, tiled: bool) -> Array:
    """Returns the matrix of one layer as plain numbers."""
    rows = jax.lax.dynamic_index_in_dim(blocks, index, keepdims=False)
    if tiled:
        rows = untile(rows, kind)
    return dequantise(rows, kind) if FORMATS[kind].dtype == "uint8" else rows


def on_host(name: str, array: Array) -> np.ndarray:
    """Returns the values of a parameter, whatever it is cut over.

    Raises:
        ModelError: other hosts have some of them.
    """
    if not array.is_fully_addressable:
        raise ModelError(f"{name} is on devices of several hosts: load the model on one host to export it")
    return np.asarray(array)


def _dtype(model: LoadedModel, undoing: Undo, layer: int, dtype: DTypeLike | None) -> np.dtype:
    """Returns the type of the tensors of a layer."""
    if dtype is not None:
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise ModelError(f"dtype={jnp.dtype(dtype)}: expected a type of floating-point numbers")
        return np.dtype(jnp.dtype(dtype))
    if undoing.adds:
        return np.dtype(model.dtype)
    types = [_own_dtype(model.params[name], layer) for name in undoing.params]
    return np.dtype(jnp.result_type(*types))


def _own_dtype(value: Array | StoredWeights, layer: int) -> DTypeLike:
    """Returns the type that a layer's values have once they are in no blocks."""
    if not isinstance(value, StoredWeights):
        return value.dtype
    kind = FORMATS[value.kinds[value.places[layer if len(value.places) > 1 else 0][0]]]
    return jnp.float32 if kind.dtype == "uint8" else jnp.dtype(kind.dtype)


def _parsed(content: bytes) -> dict[str, Any]:
    """Returns a config.json as an object."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{CONFIG}: not valid JSON ({error!s:.100})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{CONFIG}: expected a JSON object, found {type(values).__name__}")
    return values


def _written_config(model: LoadedModel, config: Mapping[str, Any], specs: list[TensorSpec]) -> dict[str, Any]:
    """Returns the config that belongs to the tensors: of the text model alone, of their type, without blocks.

    Raises:
        ModelError: it is that of another model.
    """
    if (hf_class := text_class(config)) is not None:
        config = text_config(config, hf_class)
    whole = whole_config(model.config)
    read = family(config).config(config, fused_qkv=whole.fused_qkv)
    # These may have been changed when the model was loaded: by its tensors, or by the length of its sequences.
    kept = {name: getattr(whole, name) for name in ("tie_word_embeddings", "rope", "layer_ropes")}
    tied = read.tie_word_embeddings
    if type(read) is not type(whole) or (read := replace(read, **kept)) != whole:
        differ = [f.name for f in fields(read) if getattr(read, f.name) != getattr(whole, f.name, None)]
        raise ModelError(f"the config is that of another model: it differs in {', '.join(differ)}")
    written = {key: value for key, value in config.items() if key != "quantization_config"}
    if tied != whole.tie_word_embeddings:
        written["tie_word_embeddings"] = whole.tie_word_embeddings
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.nbytes
    written["torch_dtype" if "torch_dtype" in written else "dtype"] = max(sizes, key=lambda name: sizes[name])
    return written
