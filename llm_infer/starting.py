"""From options to tokenizer and engine: joins the other hosts and loads the models; all hosts but the first follow."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.base.errors import ModelError, UserError
from llm_infer.base.forks import refuse_lost_child
from llm_infer.base.progress import Progress
from llm_infer.base.settings import Takes, document
from llm_infer.engine.compile_cache import enable_compile_cache
from llm_infer.engine.engine import Engine
from llm_infer.loading import load, require_same_tokens
from llm_infer.models.load import LoadedModel, with_kernels
from llm_infer.models.params import refuse_absent, split_model
from llm_infer.options import EngineOptions
from llm_infer.parallel.channel import Follower, Leader
from llm_infer.parallel.distributed import Channel, join, keep
from llm_infer.parallel.mesh import GivenMesh, Where
from llm_infer.text.ids_only import IdsOnly
from llm_infer.text.tokenizer import Tokenizer


class Started(NamedTuple):
    """What a front needs; `progress` is as the options say."""

    tokenizer: Tokenizer
    engine: Engine
    progress: Progress


OF_MODEL = frozenset(
    {"model", "dtype", "weights", "fused_qkv", "load_format", "skip_tokenizer_init", "device"}
    | {"tensor_parallel_size", "data_parallel_size", "expert_parallel_size"}
    | {"coordinator_address", "num_processes", "process_id"}
)
"""Settings that a loaded model has decided."""


def start_with(model: LoadedModel, options: EngineOptions, tokenizer: Tokenizer | None = None) -> Started:
    """Makes the engine of a model that is loaded already, on the devices where it is.

    Args:
        model: the model.
        options: settings; those of OF_MODEL have no meaning here.
        tokenizer: takes the place of the model's.

    Raises:
        UserError: the model's mesh has devices of other processes, or a setting does not fit.
    """
    refuse_lost_child()
    if not isinstance(model, LoadedModel):
        raise UserError(
            f"model={model!r:.60}: expected a model that load_model has loaded; LLM({model!r:.40}) takes names"
        )
    if model.mesh is not None and any(each.process_index != jax.process_index() for each in model.mesh.devices.flat):
        raise UserError("the model's mesh has devices of other processes: make LLM(name, …) there, and call follow")
    refuse_absent(model.params)
    specs = split_model(model.config, model.dtype)[1]
    if missing := sorted(specs.keys() - model.params.keys()):
        raise ModelError(f"the model has no {', '.join(missing[:5])}")
    model = replace(model, params={name: _on_device(value) for name, value in model.params.items()})
    progress = Progress(enabled=options.progress)
    tokenizer = tokenizer or model.tokenizer or IdsOnly(model.config.vocab_size)
    ready = with_kernels(model, options.precision)
    return _with_draft(replace(ready, tokenizer=tokenizer), options, None, progress)


def _on_device(value: Any) -> Any:
    """Returns arrays of NumPy as JAX's, and what else there is as it is."""
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def start(options: EngineOptions) -> Started:
    """Loads the model and makes its engine.

    Raises:
        UserError: the model cannot be found or loaded, a setting does not fit, or this process is not the first of several.
    """
    channel = _join(options, as_first=True)
    started = _make(options, channel)
    if isinstance(channel, Leader):
        channel.watch()
    return started


def take_part(options: EngineOptions) -> bool:
    """Does what `follow` says."""
    channel = _join(options)
    if not isinstance(channel, Follower):
        if channel is not None:
            keep(channel, options.of_all_processes())
        return False
    _make(options, channel).engine.follow()
    return True


@Takes(EngineOptions)
def follow(options: EngineOptions) -> bool:
    """Computes what process 0 computes, until it ends: what all other processes of several hosts call in place of `LLM`.

    All processes may run the same script; each stays in this call, but the first and a process that is alone:

        if not llm_infer.follow(**settings):
            llm = llm_infer.LLM(**settings)

    Args:
        SETTINGS

    Returns:
        True when process 0 has ended; False at once in process 0 and where there is only one process.

    Raises:
        UserError: as `LLM`, or a process did not come or has other settings.
    """
    return take_part(options)


document(follow, EngineOptions)


def _join(options: EngineOptions, *, as_first: bool = False) -> Channel | None:
    refuse_lost_child()
    where = (options.coordinator_address, options.num_processes, options.process_id)
    return join(*where, options.of_all_processes(), as_first=as_first)


def _make(options: EngineOptions, channel: Channel | None) -> Started:
    _require_device(options.device)
    progress = Progress(enabled=options.progress and not isinstance(channel, Follower))
    if note := enable_compile_cache():
        progress.note(note)
    loaded = _load_one(options.model, options, options.parallel_config(), progress, options.max_model_len)
    return _with_draft(loaded, options, channel, progress)


def _with_draft(loaded: LoadedModel, options: EngineOptions, channel: Channel | None, progress: Progress) -> Started:
    """Makes the engine of a model, with its draft model if one is named."""
    config, tokenizer, draft = options.engine_config(), loaded.tokenizer, None
    assert tokenizer is not None
    if config.speculative is not None and config.speculative.model is not None:
        name = config.speculative.model
        where: Where = options.parallel_config()
        if loaded.mesh is not None:
            where = GivenMesh(loaded.mesh, loaded.config.shards.names)
        try:
            draft = _load_one(name, options, where, progress, ids_only=not tokenizer.has_text)
        except UserError as error:  # it need not be cut like the model
            raise UserError(f"the draft model {name!r}: {error}") from error
        assert draft.tokenizer is not None
        if tokenizer.has_text:
            require_same_tokens(tokenizer, draft.tokenizer, name)
    engine = Engine(loaded, config, tokenizer.eos_token_ids, draft_model=draft, channel=channel)
    return Started(tokenizer, engine, progress)


def _load_one(
    name: str | os.PathLike[str],
    options: EngineOptions,
    parallel: Where,
    progress: Progress,
    max_model_len: int | None = None,
    ids_only: bool = False,
) -> LoadedModel:
    return load(
        name,
        load_format=options.load_format,
        fused_qkv=options.fused_qkv,
        dtype=options.dtype,
        precision=options.precision,
        weights=options.weights,
        progress=progress,
        parallel=parallel,
        skip_tokenizer_init=options.skip_tokenizer_init or ids_only,
        max_model_len=max_model_len,
    )


def _require_device(device: str) -> None:
    """Raises UserError if JAX has another kind of device: settings made for one waste memory and time of another."""
    found = jax.default_backend()
    if device not in ("auto", found):
        raise UserError(
            f"device={device!r}: JAX found {jax.device_count()} × {found} here (llm-infer doctor tells more): take settings "
            f"made for it, or set device to {found!r} to run with these all the same"
        )
