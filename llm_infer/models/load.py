"""From a resolved model source to a definition with loaded parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from llm_infer.errors import ModelError
from llm_infer.models.architectures import architecture_names, read_architecture
from llm_infer.models.config import ModelConfig
from llm_infer.models.config_json import config_from_json, config_to_json
from llm_infer.models.decoder import Params, random_params, split_model
from llm_infer.models.registry import family
from llm_infer.weights.checkpoint_writer import write_checkpoint
from llm_infer.weights.loader import load_parameters
from llm_infer.weights.orbax_checkpoint import Checkpoint
from llm_infer.weights.progress import Progress
from llm_infer.weights.sources import OpenModel, read_json


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: what it is (`config`, `definition`) and what it knows (`params`, of `dtype`)."""

    config: ModelConfig
    definition: nnx.GraphDef
    params: Params
    dtype: jnp.dtype


def load_model(
    opened: OpenModel, *, dtype: DTypeLike = jnp.float32, fused_qkv: bool = True, progress: Progress | None = None
) -> LoadedModel:
    """Reads the configuration, then the weights straight into stacked parameters.

    A checkpoint that stores `dtype` is mapped as it is.

    Raises:
        ModelError: unknown architecture or config key; missing, surplus or misshapen tensors; a damaged file.
    """
    if opened.checkpoint is not None:
        return _load_checkpoint(opened.checkpoint, dtype, fused_qkv, progress)
    module = family(opened.config)
    config = module.config(opened.config, fused_qkv=fused_qkv)
    definition, specs = split_model(config, dtype)
    params = load_parameters(
        opened.tensors,
        specs,
        module.rules(config),
        num_layers=config.num_layers,
        ignore=module.IGNORED_TENSORS,
        progress=progress,
    )
    return LoadedModel(config, definition, params, jnp.dtype(dtype))


def _load_checkpoint(
    checkpoint: Checkpoint, dtype: DTypeLike, fused_qkv: bool, progress: Progress | None
) -> LoadedModel:
    config = config_from_json(checkpoint.model)
    if config.fused_qkv != fused_qkv:
        raise ModelError(
            f"{checkpoint.path} was written with fused_qkv={config.fused_qkv}, asked for is fused_qkv={fused_qkv}: "
            f"set fused_qkv={config.fused_qkv}, or convert the model again"
        )
    definition, specs = split_model(config, dtype)
    return LoadedModel(config, definition, checkpoint.restore(specs, progress=progress), jnp.dtype(dtype))


def save_model(
    model: LoadedModel,
    destination: str | Path,
    tokenizer_files: Mapping[str, bytes],
    *,
    progress: Progress | None = None,
) -> None:
    """Writes an Orbax checkpoint that `load_model` reads without converting anything; see `write_checkpoint`."""
    write_checkpoint(
        destination,
        model.params,
        model=config_to_json(model.config),
        tokenizer_files=tokenizer_files,
        progress=progress,
    )


def dummy_model(config: ModelConfig, dtype: DTypeLike = jnp.float32, seed: int = 0) -> LoadedModel:
    """A model with random weights made on the device; nothing is read."""
    definition, _ = split_model(config, dtype)
    return LoadedModel(config, definition, random_params(config, dtype, seed), jnp.dtype(dtype))


def dummy_source(name: str) -> tuple[dict[str, Any], Path | None]:
    """The Hugging Face config of a model of which only the shape is wanted, and its directory if it has one.

    Args:
        name: an architecture of configs/models, or a directory with a config.json (weights need not be there).

    Raises:
        ModelError: there is neither.
    """
    path = Path(name).expanduser()
    if name not in architecture_names() and (path / "config.json").is_file():
        return read_json(path / "config.json"), path
    return read_architecture(name), None
