"""Every setting of an engine, once: arguments of `LLM`, TOML files, flags and what hosts compare come from `EngineOptions`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.base.files import read_toml
from llm_infer.base.settings import Setting, by_name, document, setting, settings_of
from llm_infer.config import (
    DTYPES,
    LOGPROBS_MODES,
    NUMERICS,
    PAGE_DTYPES,
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)

DEFAULT_MODEL_NAME = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything that an `LLM`, or another front, is made from; checked when it is made.

    Attributes:
        SETTINGS

    Raises:
        UserError: a value has another type than its setting, is out of range or contradicts another.
    """

    model: str | os.PathLike[str] = setting(  # noqa: RUF009  # it makes a field
        DEFAULT_MODEL_NAME,
        "A name, GGUF file, directory or hub id org/name[:Q4_K_M]. The default model's name; the directory is one of Hugging "
        "Face or was written by `llm-infer convert`; behind the colon stands a type of GGUF file.",
        short="-m",
    )
    _: KW_ONLY
    max_model_len: int | None = setting(
        None, "Longest sequence in tokens; else the model's context.", short="-c", aliases=("ctx_size",)
    )
    max_num_seqs: int = setting(32, "Most sequences that run at the same time. Counts per data-parallel shard.")
    max_num_batched_tokens: int = setting(
        512, "Most tokens of one step. Longer prompts are computed in chunks. Counts per data-parallel shard."
    )
    page_size: int = setting(16, "Tokens in a KV page: 8, 16, 32, 64 or 128.", aliases=("block_size",))
    num_pages: int | None = setting(
        None,
        "Pages of the pool; else as many as fit its memory. Counts per data-parallel shard.",
        aliases=("num_gpu_blocks_override",),
    )
    kv_cache_memory: int | None = setting(
        None,
        "Bytes of the page pool; else a share of the device's. See `memory_utilization`.",
        aliases=("kv_cache_memory_bytes",),
    )
    memory_utilization: float | None = setting(
        None,
        "Share of each device's memory to use (0.9). It holds weights, pages and steps together: the page count follows from "
        "what the compiler says of the largest step. By default 0.9 on accelerators; on CPUs the pool is then the smaller of "
        "1 GiB and a quarter of the memory.",
        aliases=("gpu_memory_utilization",),
    )
    enable_prefix_caching: bool = setting(True, "Share the pages of equal prompt beginnings.")
    disable_hybrid_kv_cache_manager: bool = setting(False, "Keep the pages that layers with a window have left behind.")
    num_state_snapshots: int | None = setting(
        None,
        "States of recurrent models to keep for later prompts. Behind full pages, so that the prefix cache can go on from "
        "there; else 256 MiB of them. Counts per data-parallel shard.",
    )
    policy: str = setting(
        "fcfs",
        "Order of waiting requests. First come, first served; or by the `priority` of each, smaller first.",
        choices=("fcfs", "priority"),
        aliases=("scheduling_policy",),
    )
    num_scheduler_steps: int = setting(
        1,
        "Decode steps that run as one program. They do so where nothing needs the host in between: the output is the same, "
        "a stream gets so many tokens at once.",
    )
    seed: int = setting(0, "Seed of requests that have none of their own.")
    fused_qkv: bool = setting(True, "Keep query, key and value projections as one matrix.")
    device: str = setting(
        "auto",
        "Run only on this kind of device. `auto` takes what JAX finds.",
        choices=("auto", "cpu", "gpu", "tpu"),
    )
    dtype: str = setting(
        "auto",
        "Type of weights and activations. Of a draft model, too. `auto` is float32 on CPUs, where weights then stay as the "
        "file has them, and bfloat16 on accelerators.",
        choices=("auto", *DTYPES),
    )
    weights: str = setting(
        "stored",
        "On CPUs: keep matrices as the file stores them, or dense. `dense` keeps plain numbers of `dtype`, which take more "
        "memory and time, and can be changed (`LLM.update_weights`) without rounding them to the file's type.",
        choices=("stored", "dense"),
    )
    precision: str = setting(
        "exact",
        "On CPUs: exact, or fast with int8 activations. `exact` computes in float32 with the file's weights; `fast` also rounds "
        "activations to int8 before they meet 4-bit weights, and keeps bfloat16 pages; it needs the native kernels.",
        choices=("exact", "fast"),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Type of keys and values in the pages. `auto` follows `dtype` and `precision`. int8 is for CPUs, with a scale for each "
        "token and head: about half the memory of bfloat16.",
        choices=("auto", *PAGE_DTYPES),
    )
    overlap: bool = setting(True, "Prepare a step while the device runs the one before.")
    check_every_step: bool = setting(False, "Check the books after each step. It is slow, and meant for debugging.")
    logprobs_mode: str = setting(
        LOGPROBS_MODES[0],
        "Whose log-probabilities to tell: the model's or the draw's. `processed_logprobs` are those of the distribution that "
        "tokens are drawn from, after penalties, temperature and limits; those of prompts are always the model's.",
        choices=LOGPROBS_MODES,
    )
    numerics: str = setting(
        NUMERICS[0],
        "`invariant` gives a token the same bits in any company. That is whatever the batch, chunks, preemption, "
        "cached pages and speculation; a start that cannot promise it says why. Native CPU kernels always do so; a GPU takes "
        "kernels with a fixed order of additions, which are slower (docs/precision.md).",
        choices=NUMERICS,
    )
    speculative_config: Mapping[str, Any] | None = setting(
        None,
        "Propose tokens that one step checks together (speculation). The output is the same, in fewer steps. "
        '`{"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 4, "prompt_lookup_min": 2}` proposes what '
        "followed the last tokens when they occurred before; "
        '`{"method": "draft_model", "model": "…", "num_speculative_tokens": 4}` proposes what a smaller model with the same '
        "tokens draws.",
    )
    tensor_parallel_size: int = setting(
        1, "Devices over which every layer is cut. It is cut by heads and columns of the MLP.", short="-tp"
    )
    data_parallel_size: int = setting(
        1,
        "Shards of the batch, each on devices of its own. Each has a copy of the model and pages of its own.",
        short="-dp",
    )
    expert_parallel_size: int = setting(1, "Devices over which a mixture's experts are spread.")
    coordinator_address: str | None = setting(
        None,
        "With several hosts: address and port of process 0. As in 10.0.0.1:8476; the port is free. SLURM and Cloud TPU "
        "tell this, `num_processes` and `process_id`. All but process 0 call `llm_infer.follow` with the same settings.",
        of_process=True,
    )
    num_processes: int | None = setting(None, "With several hosts: processes, one on each.", of_process=True)
    process_id: int | None = setting(None, "With several hosts: number of this process, from 0.", of_process=True)
    load_format: str = setting(
        "auto",
        "Read the weights, or make random ones (dummy). `auto` reads the model's; `dummy` makes "
        "random ones on the device, for a published architecture (see `llm-infer models`) or a directory with a config.json.",
        choices=("auto", "dummy"),
    )
    skip_tokenizer_init: bool = setting(
        False, "Take and give token ids alone. Nothing is read of a tokenizer, and no result has a text."
    )
    progress: bool = setting(True, "Show progress bars on stderr.", of_process=True)

    def __post_init__(self) -> None:
        for name, each in settings().items():
            object.__setattr__(self, name, each.checked(getattr(self, name)))
        self.engine_config()
        self.parallel_config()

    def engine_config(self) -> EngineConfig:
        """Makes what an `Engine` is built from."""
        pages = "bfloat16" if self.precision == "fast" else None
        return EngineConfig(
            cache=CacheConfig(
                self.page_size,
                self.num_pages,
                self.kv_cache_memory,
                self.memory_utilization,
                enable_prefix_caching=self.enable_prefix_caching,
                disable_hybrid_kv_cache_manager=self.disable_hybrid_kv_cache_manager,
                dtype=pages if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
                num_state_snapshots=self.num_state_snapshots,
            ),
            scheduler=SchedulerConfig(
                self.max_num_seqs,
                self.max_num_batched_tokens,
                self.max_model_len,
                self.policy,
                num_scheduler_steps=self.num_scheduler_steps,
            ),
            seed=self.seed,
            overlap=self.overlap,
            check_every_step=self.check_every_step,
            fused_qkv=self.fused_qkv,
            logprobs_mode=self.logprobs_mode,
            numerics=self.numerics,
            speculative=None if self.speculative_config is None else SpeculativeConfig.of(self.speculative_config),
        )

    def parallel_config(self) -> ParallelConfig:
        """Returns the sizes of the mesh."""
        return ParallelConfig(self.tensor_parallel_size, self.data_parallel_size, self.expert_parallel_size)

    def of_all_processes(self) -> dict[str, str]:
        """Returns the settings that all processes of several hosts must agree on, as texts."""
        return {name: str(getattr(self, name)) for name, each in settings().items() if not each.of_process}


document(EngineOptions, EngineOptions)


def settings() -> dict[str, Setting]:
    """Returns all settings by name."""
    return settings_of(EngineOptions)


def read_options(path: str | Path) -> dict[str, Any]:
    """Reads settings, by name, from a TOML file of `max-num-seqs = 64` and the like.

    Raises:
        UserError: the file cannot be read, is not TOML, or has a key that is no setting, a value of another type, or the
            same setting twice. The message begins with `--config` and the file.
    """
    values = read_toml(path, f"--config {path}")
    try:
        found = by_name(EngineOptions, values)
        return {name: settings()[name].checked(value) for name, value in found.items()}
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
