"""From a resolved model source to a definition with loaded parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from llm_infer.base.errors import ModelError, UserError
from llm_infer.base.files import typed_path
from llm_infer.base.progress import Progress
from llm_infer.config import ONE_DEVICE
from llm_infer.models.architectures import architecture_names, read_architecture
from llm_infer.models.config import ModelConfig
from llm_infer.models.config_json import config_from_json, config_to_json
from llm_infer.models.opened import OpenModel
from llm_infer.models.own import OwnDefinition
from llm_infer.models.params import Definition, Params, random_params, split_model
from llm_infer.models.registry import family
from llm_infer.models.sharded import Placement, place_over
from llm_infer.models.tied_head import HuggingFaceTensors, embedding_or_head, own_head
from llm_infer.parallel.mesh import Where
from llm_infer.parallel.rules import size_over
from llm_infer.quant.stored import StoredWeights, store_dense
from llm_infer.weights.checkpoint_writer import write_checkpoint
from llm_infer.weights.loader import load_parameters
from llm_infer.weights.orbax_checkpoint import Checkpoint
from llm_infer.weights.sources import read_json
from pallas_kernels import cpu_ffi, dispatch
from pallas_kernels.quant_matmul import FORMATS

if TYPE_CHECKING:
    from llm_infer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files say beside its weights.

    Attributes:
        config: as Hugging Face's config.json has it; None where there is none.
        tokenizer: reads the files of the tokenizer, relative path → content; a start has no use for them.
    """

    config: Mapping[str, Any] | None
    tokenizer: Callable[[], Mapping[str, bytes]]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: what it is (`config`, `definition`), what it knows (`params`, of `dtype`), and where (`mesh`).

    `mesh` is None for one device. Over a mesh `config` is that of the cut model, see `models.sharded`. `tokenizer` is None
    for a model that came without, `files` for one that was not read.
    """

    config: ModelConfig
    definition: Definition
    params: Params
    dtype: jnp.dtype
    mesh: Mesh | None = None
    tokenizer: Tokenizer | None = None
    files: ModelFiles | None = None

    def with_params(self, params: Params) -> LoadedModel:
        """Returns the same model with other parameters, such as those of a trainer; nothing is copied."""
        return replace(self, params=dict(params))

    @property
    def num_shards(self) -> int:
        """Data-parallel shards: copies of the model, each with pages of its own."""
        return 1 if self.mesh is None else size_over(self.mesh, self.config.shards.names.dp)

    @property
    def smallest_batch(self) -> int:
        """Rows that a step has at least.

        XLA multiplies a single row by another code path, with other roundings, than it does two and more; the kernels
        of stored weights give a row the same bits in any company.
        """
        if isinstance(self.definition, OwnDefinition):
            return 2
        matrices = (array for array in self.params.values() if len(array.shape) > 2)
        stored = all(isinstance(each, StoredWeights) for each in (*matrices, self.params["embed.weight"]))
        return 1 if stored else 2


def load_model(
    opened: OpenModel,
    *,
    dtype: DTypeLike = jnp.float32,
    fused_qkv: bool = True,
    stored: str | None = None,
    dense: bool = False,
    parallel: Where = ONE_DEVICE,
    progress: Progress | None = None,
    max_model_len: int | None = None,
) -> LoadedModel:
    """Reads the configuration, then the weights straight into stacked parameters.

    A checkpoint that stores `dtype` is mapped as it is.

    Args:
        opened: the model's files.
        dtype: type of parameters and activations.
        fused_qkv: one matrix for query, key and value projections; a file that holds them in blocks of different
            kinds has three all the same when `stored` keeps them so.
        stored: keep matrices in the form of the file and multiply with them in this precision (see `compute_dtype`);
            None reads values of `dtype`.
        dense: read values of `dtype` all the same, and have those kernels multiply with these.
        parallel: sizes of the mesh over which the model is cut, or that mesh; every device gets its part of each parameter.
        progress: reports what is read.
        max_model_len: length of the longest sequence, by which LongRoPE chooses its factors; None for the model's.

    Raises:
        UserError: the model cannot be cut so, or the mesh is larger than the devices.
        ModelError: unknown architecture or config key; missing, surplus or misshapen tensors; a damaged file.
    """
    if opened.checkpoint is not None:
        loaded = _load_checkpoint(opened.checkpoint, dtype, fused_qkv, parallel, progress, max_model_len)
        return loaded if stored is None else _with_stored(loaded, stored)
    if dense and stored is not None:
        read = load_model(
            opened, dtype=dtype, fused_qkv=fused_qkv, parallel=parallel, progress=progress, max_model_len=max_model_len
        )
        return _with_stored(read, stored)
    module = family(opened.config)
    config = module.config(opened.config, fused_qkv=fused_qkv).for_length(max_model_len)
    if stored is not None and fused_qkv and _mixed_qkv(opened, config):
        config = replace(config, fused_qkv=False)
    if stored is not None and (kinds := _kinds_without_kernel(opened)):
        note = f"weights of type {', '.join(kinds)} are read as float32: no native kernel multiplies with them"
        (progress or Progress.silent()).note(note)
    rules = module.rules(config)
    if opened.note is not None:
        (progress or Progress.silent()).note(opened.note)
    if opened.gguf is None:
        tensors = cast(HuggingFaceTensors, opened.tensors)
        untied = own_head(config, rules, tensors)
        if untied is not config:
            note = "config.json says that the head is the embedding, lm_head.weight differs from it: the model uses it"
            (progress or Progress.silent()).note(note)
        config = untied
        rules = embedding_or_head(config, module.rules(config), tensors)
    placement = place_over(config, parallel)
    definition, specs = split_model(config, dtype)
    params = load_parameters(
        opened.tensors,
        specs,
        rules,
        num_layers=config.num_layers,
        ignore=module.IGNORED_TENSORS,
        progress=progress,
        stored=stored,
        place=placement,
        cuts=None if placement is None else placement.cuts,
    )
    return _finer(_loaded(config, definition, params, dtype, placement))


def _finer(model: LoadedModel) -> LoadedModel:
    """Returns the model with FINE_IN_FAST applied."""

    def finer(name: str, value: Array | StoredWeights) -> Array | StoredWeights:
        fast = isinstance(value, StoredWeights) and value.precision == "fast" and name in FINE_IN_FAST
        return replace(value, precision="fine") if fast else value  # type: ignore[type-var]

    return replace(model, params={name: finer(name, value) for name, value in model.params.items()})


def _loaded(
    config: ModelConfig, definition: Definition, params: Params, dtype: DTypeLike, placement: Placement | None
) -> LoadedModel:
    """Returns the model of these parameters, of the whole config or else as it is cut."""
    if placement is None:
        return LoadedModel(config, definition, params, jnp.dtype(dtype))
    definition, _ = split_model(placement.config, dtype)
    return LoadedModel(placement.config, definition, params, jnp.dtype(dtype), placement.mesh)


COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("exact", "fast")
FINE_IN_FAST = frozenset(f"layers.attn.{name}.weight" for name in ("qkv", "q", "k", "v"))
"""Matrices that `fast` gives finer activations: few weights, and of all layers' matrices rounding shows most in these (of the
default model's mean KL 40 %, for 16 % of the products)."""


def compute_dtype(dtype: str, precision: str) -> tuple[jnp.dtype, str | None]:
    """Chooses the type of parameters and activations on this platform, and `precision` where native kernels multiply with weights
    in the form of the file, else None.

    Args:
        dtype: one of COMPUTE_DTYPES, or "auto": float32 on CPUs, bfloat16 elsewhere.
        precision: one of PRECISIONS.

    Raises:
        UserError: no such type or precision, or one that needs those kernels where they cannot run.
    """
    if dtype != "auto" and dtype not in COMPUTE_DTYPES:
        raise UserError(f"dtype={dtype!r}: expected auto, {', '.join(COMPUTE_DTYPES)}")
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    platform, _ = dispatch.target()
    reason = cpu_ffi.why_not() if platform == "cpu" else f"does not run on {platform}"
    if dtype not in ("auto", "float32"):
        reason = f"dtype={dtype} is not float32"
    if reason is not None and precision != "exact":
        raise UserError(f"precision={precision!r} needs the native CPU kernels, which are not usable: {reason}")
    chosen = ("float32" if platform == "cpu" else "bfloat16") if dtype == "auto" else dtype
    return jnp.dtype(chosen), precision if reason is None else None


def _kinds_without_kernel(opened: OpenModel) -> list[str]:
    """Returns the block types of the file's matrices that are not among the formats of `quant_matmul`."""
    tensors = opened.gguf.tensors.values() if opened.gguf is not None else ()
    return sorted({t.type for t in tensors if len(t.shape) > 1 and t.type.lower() not in FORMATS})


def _mixed_qkv(opened: OpenModel, config: ModelConfig) -> bool:
    """Tells whether some layer's query, key and value projections are stored in blocks of different kinds."""
    (rule,) = [rule for rule in family(opened.config).rules(config) if rule.param == "layers.attn.qkv.weight"]
    names = set(opened.tensors.names)
    for group in rule.tensor_names(config.num_layers if config.num_layers < len(names) else 0):
        if len({opened.tensors.stored_kind(name) for name in group if name in names}) > 1:
            return True
    return False


def with_kernels(model: LoadedModel, precision: str = "exact") -> LoadedModel:
    """Returns the model with its dense matrices handed to the kernels that multiply with stored weights; nothing is copied.

    Where those kernels cannot run, or the model is of another type than float32, it stays as it is.

    Raises:
        UserError: `precision` is not to be had here.
    """
    _, stored = compute_dtype(model.dtype.name, precision)
    own = isinstance(model.definition, OwnDefinition)
    return model if stored is None or own else _with_stored(model, stored)


def _with_stored(model: LoadedModel, precision: str) -> LoadedModel:
    """Returns the model with its dense matrices handed to the kernels that multiply with stored weights; nothing is copied."""
    placement = None if model.mesh is None else Placement(model.config, model.mesh)

    def wrap(name: str, value: Any) -> Any:
        kept = _for_kernels(name, value, precision, 1 if placement is None else placement.cuts(name))
        if kept is not value and placement is not None:
            return jax.device_put(kept, placement.sharding(name, 3))
        return kept

    return _finer(replace(model, params={name: wrap(name, value) for name, value in model.params.items()}))


def _for_kernels(name: str, value: Any, precision: str, cuts: int = 1) -> Any:
    """Returns a dense matrix as the kernels for stored weights take it, whose last axis is cut so often; all else as it is."""
    if isinstance(value, StoredWeights):
        return value
    if name not in ("embed.weight", "head.weight") and not (name.endswith(".weight") and value.ndim == 3):
        return value
    kept = store_dense(value, precision, cuts)
    return value if kept is None else kept


def has_kernels(model: LoadedModel) -> bool:
    """Tells whether native kernels compute this model, in which a token's numbers do not depend on its company."""
    return not isinstance(model.definition, OwnDefinition) and compute_dtype(model.dtype.name, "exact")[1] is not None


def kernel_params(model: LoadedModel, params: Params) -> Params:
    """Returns parameters (one device's part, maybe traced) as an engine with precision "exact" has them: matrices of plain
    float32 go to the kernels for stored weights, where these can run."""
    if not has_kernels(model):
        return params
    return {name: _for_kernels(name, value, "exact") for name, value in params.items()}


def _load_checkpoint(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    fused_qkv: bool,
    parallel: Where,
    progress: Progress | None,
    max_model_len: int | None,
) -> LoadedModel:
    config = config_from_json(checkpoint.model).for_length(max_model_len)
    if config.fused_qkv != fused_qkv:
        raise ModelError(
            f"{checkpoint.path} was written with fused_qkv={config.fused_qkv}, asked for is fused_qkv={fused_qkv}: "
            f"set fused_qkv={config.fused_qkv}, or convert the model again"
        )
    placement = place_over(config, parallel)
    definition, specs = split_model(config, dtype)
    params = checkpoint.restore(specs, place=placement, progress=progress)
    return _loaded(config, definition, params, dtype, placement)


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


def dummy_model(
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    stored: str | None = None,
    parallel: Where = ONE_DEVICE,
) -> LoadedModel:
    """Makes a model with random weights on its devices; nothing is read. `stored` and `parallel` as for `load_model`.

    Raises:
        UserError: the model cannot be cut so, or does not fit into memory.
    """
    placement = place_over(config, parallel)
    definition, specs = split_model(config, dtype)
    shardings = placement and {name: placement.sharding(name, len(spec.shape)) for name, spec in specs.items()}
    try:
        made = random_params(config, dtype, seed, placement and placement.arrange, shardings)
        params = jax.block_until_ready(made)  # which is when it is known
    except jax.errors.JaxRuntimeError as error:
        if "out of memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = sum(spec.size for spec in specs.values()) * jnp.dtype(dtype).itemsize / 1e9
        raise UserError(
            f"{size:.0f} GB of random weights do not fit into memory: take a smaller architecture (llm-infer models lists them), "
            "a narrower dtype, or more devices"
        ) from None
    model = _loaded(config, definition, params, dtype, placement)
    return model if stored is None else _with_stored(model, stored)


def dummy_source(name: str) -> tuple[dict[str, Any], Path | None]:
    """Returns the Hugging Face config of a model of which only the shape is wanted, and its directory if it has one.

    Args:
        name: an architecture of configs/models, or a directory with a config.json (weights need not be there).

    Raises:
        ModelError: there is neither.
    """
    path = typed_path(name)
    if name not in architecture_names() and os.path.isfile(path / "config.json"):
        return read_json(path / "config.json"), path
    return read_architecture(name), None
