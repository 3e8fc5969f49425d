"""From options to tokenizer and engine: joins the other hosts and loads the models; all hosts but the first follow."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax

from llm_infer.base.errors import UserError
from llm_infer.base.forks import refuse_lost_child
from llm_infer.base.progress import Progress
from llm_infer.base.settings import Takes, document
from llm_infer.engine.compile_cache import enable_compile_cache
from llm_infer.engine.engine import Engine
from llm_infer.loading import load, require_same_tokens
from llm_infer.options import EngineOptions
from llm_infer.parallel.channel import Follower, Leader
from llm_infer.parallel.distributed import Channel, join, keep
from llm_infer.text.tokenizer import Tokenizer


class Started(NamedTuple):
    """What a front needs; `progress` is as the options say."""

    tokenizer: Tokenizer
    engine: Engine
    progress: Progress


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
    config = options.engine_config()
    progress = Progress(enabled=options.progress and not isinstance(channel, Follower))
    if note := enable_compile_cache():
        progress.note(note)
    load_one = partial(
        load,
        load_format=options.load_format,
        fused_qkv=options.fused_qkv,
        dtype=options.dtype,
        precision=options.precision,
        weights=options.weights,
        progress=progress,
        parallel=options.parallel_config(),
    )
    tokenizer, loaded = load_one(options.model, max_model_len=options.max_model_len)
    draft = None
    if config.speculative is not None and config.speculative.model is not None:
        name = config.speculative.model
        try:
            of_draft, draft = load_one(name)
        except UserError as error:  # it need not be cut like the model
            raise UserError(f"the draft model {name!r}: {error}") from error
        require_same_tokens(tokenizer, of_draft, name)
    engine = Engine(loaded, config, tokenizer.eos_token_ids, draft_model=draft, channel=channel)
    return Started(tokenizer, engine, progress)


def _require_device(device: str) -> None:
    """Raises UserError if JAX has another kind of device: settings made for one waste memory and time of another."""
    found = jax.default_backend()
    if device not in ("auto", found):
        raise UserError(
            f"device={device!r}: JAX found {jax.device_count()} × {found} here (llm-infer doctor tells more): take settings "
            f"made for it, or set device to {found!r} to run with these all the same"
        )
