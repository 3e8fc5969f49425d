"""Engine arguments from a TOML file such as configs/serving/cpu.toml: keys are the command line's flags without dashes."""

from __future__ import annotations

import difflib
import inspect
import tomllib
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.llm import LLM

VLLM_NAMES = {
    "block_size": "page_size",
    "gpu_memory_utilization": "memory_utilization",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "num_gpu_blocks_override": "num_pages",
    "scheduling_policy": "policy",
}
"""Names of vLLM's flags where an argument of `LLM` is called otherwise."""


def argument_names() -> list[str]:
    """Keyword arguments of `LLM`."""
    return [name for name, p in inspect.signature(LLM).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]


def read_engine_arguments(path: str | Path) -> dict[str, Any]:
    """Arguments for `LLM` from a file of `max-num-seqs = 64` and the like.

    Raises:
        UserError: the file cannot be read, is not TOML, or has a key that is no argument, or the same one twice.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    known, result = argument_names(), {}
    for key, value in values.items():
        name = key.replace("-", "_")
        name = VLLM_NAMES.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *VLLM_NAMES], n=1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"--config {path}: {key!r} is no engine argument; {hint}")
        if name in result:
            raise UserError(f"--config {path}: {name} is set twice, the second time as {key!r}")
        result[name] = value
    return result
