"""Configuration of an engine: frozen after start, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.base.plain_values import plain


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_integers(config: object, *names: str) -> None:
    """Turns numbers of NumPy into Python's, and refuses what is no whole number."""
    for name in names:
        value = plain(getattr(config, name))
        object.__setattr__(config, name, value)
        ok = value is None or (isinstance(value, int) and not isinstance(value, bool))
        _require(ok, f"{name}={value!r}: expected a whole number")


def _require_switches(config: object, *names: str) -> None:
    for name in names:
        value = plain(getattr(config, name))
        _require(isinstance(value, bool), f"{name}={value!r:.60}: expected True or False")


DTYPES = ("float32", "bfloat16", "float16")
PAGE_DTYPES = (*DTYPES, "int8")


LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
"""Whose log-probabilities are told: the model's own, or those after penalties, temperature and limits; names as in vLLM."""

NUMERICS = ("auto", "invariant")
"""Kernels that are fastest, or those that give a row the same bits in any company (`pallas_kernels.numerics`)."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Size and sharing of the KV page pool.

    Attributes:
        page_size: tokens in a page.
        num_pages: pages per data-parallel shard including the null page; None sizes the pool from `memory_bytes`. A page holds
            all layers, or those of one group where layers with windows have pages of their own (`kvcache.groups`).
        memory_bytes: bytes of the pool; None sizes it from `memory_utilization`.
        memory_utilization: share of each device's memory for weights, pages and steps together; None is 0.9 on
            accelerators, and on CPUs a pool of the smaller of 1 GiB and 25 % of RAM.
        enable_prefix_caching: keep full pages of finished sequences and share them with later prompts.
        disable_hybrid_kv_cache_manager: keep the pages that layers with a window have left behind, as if they saw all.
        dtype: of keys and values in the pages, one of PAGE_DTYPES; None takes the model's. int8 is for CPUs: each token and head
            has a scale in its page.
        num_state_snapshots: of recurrent models, states kept for later prompts, beside two for each running sequence; None takes
            256 MiB of them.
    """

    page_size: int = 16
    num_pages: int | None = None
    memory_bytes: int | None = None
    memory_utilization: float | None = None
    enable_prefix_caching: bool = True
    dtype: str | None = None
    disable_hybrid_kv_cache_manager: bool = False
    num_state_snapshots: int | None = None

    def __post_init__(self) -> None:
        _require_integers(self, "page_size", "num_pages", "memory_bytes", "num_state_snapshots")
        _require(
            self.num_state_snapshots is None or self.num_state_snapshots >= 0,
            f"num_state_snapshots={self.num_state_snapshots}: expected 0 or more",
        )
        _require_switches(self, "enable_prefix_caching", "disable_hybrid_kv_cache_manager")
        _require(
            self.dtype is None or self.dtype in PAGE_DTYPES,
            f"kv_cache_dtype={self.dtype!r}: expected auto, {', '.join(PAGE_DTYPES)}",
        )
        _require(
            self.memory_bytes is None or self.memory_bytes > 0,
            f"kv_cache_memory={self.memory_bytes}: expected a positive number of bytes",
        )
        share = plain(self.memory_utilization)
        _require(
            share is None or (isinstance(share, int | float) and 0 < share <= 1),
            f"memory_utilization={share!r}: expected a share above 0 and up to 1",
        )
        object.__setattr__(self, "memory_utilization", share)
        _require(
            self.page_size in (8, 16, 32, 64, 128),
            f"page_size={self.page_size} is not supported: set page_size to 8, 16, 32, 64 or 128",
        )
        _require(
            self.num_pages is None or self.num_pages >= 2,
            f"num_pages={self.num_pages} leaves no usable page beside the null page: set num_pages to 2 or more",
        )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step.

    Attributes:
        max_num_seqs: sequences that run at the same time, per data-parallel shard.
        max_num_batched_tokens: tokens of one step, per data-parallel shard; longer prompts are prefilled in chunks.
        max_model_len: longest sequence in tokens (prompt and output); None takes the model's context length.
        policy: order of waiting requests, "fcfs" or "priority" (smaller value first).
        watermark: share of the pages kept free when a waiting sequence is admitted, so that it is not preempted at once.
        num_scheduler_steps: decode steps that run as one program where nothing needs the host in between.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    policy: str = "fcfs"
    watermark: float = 0.01
    num_scheduler_steps: int = 1

    def __post_init__(self) -> None:
        _require_integers(self, "max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_scheduler_steps")
        _require(
            1 <= self.num_scheduler_steps <= 64, f"num_scheduler_steps={self.num_scheduler_steps}: expected 1 to 64"
        )
        _require(self.max_num_seqs >= 1, f"max_num_seqs={self.max_num_seqs}: must be at least 1")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens={self.max_num_batched_tokens} is smaller than max_num_seqs={self.max_num_seqs}: "
            "every running sequence needs one token a step; raise max_num_batched_tokens or lower max_num_seqs",
        )
        _require(
            self.max_model_len is None or self.max_model_len >= 2,
            f"max_model_len={self.max_model_len}: must hold at least one prompt token and one new token",
        )
        _require(
            self.policy in ("fcfs", "priority"), f"policy={self.policy!r}: expected 'fcfs' (first come) or 'priority'"
        )
        _require(0.0 <= self.watermark < 1.0, f"watermark={self.watermark}: expected a share from 0 to below 1")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Over how many devices a model runs. Names as in vLLM.

    Attributes:
        tensor_parallel_size: parts of every layer: heads and MLP columns.
        data_parallel_size: shards of the batch, each with pages of its own and a copy of the model.
        expert_parallel_size: parts of a mixture's experts; the rest of a layer is cut over these devices as over those of
            `tensor_parallel_size`.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_integers(self, field.name)
            value = getattr(self, field.name)
            _require(value is not None and value >= 1, f"{field.name}={value}: expected 1 or more")

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.tensor_parallel_size * self.data_parallel_size * self.expert_parallel_size

    def __str__(self) -> str:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or "tensor" in name)

    def beside(self, other: ParallelConfig) -> str:
        """Returns these sizes, in words for somebody who has set `other`: every size that is not 1 in either."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or getattr(other, name) > 1)


ONE_DEVICE = ParallelConfig()


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Speculative decoding: tokens that are proposed cheaply and checked together in one step. Names as in vLLM.

    Attributes:
        method: "ngram" proposes what followed the last tokens when they occurred before in the sequence, "draft_model" what
            a second model draws.
        model: name of the draft model; it has the same tokens as the model.
        num_speculative_tokens: most tokens proposed at once; fewer where fewer pay.
        prompt_lookup_max, prompt_lookup_min: length of the run of tokens that must have occurred before; longest first.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 7
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    model: str | None = None

    def __post_init__(self) -> None:
        methods = ("ngram", "draft_model")
        _require(self.method in methods, f"speculative method={self.method!r}: expected one of {', '.join(methods)}")
        _require(
            (self.model is not None) == (self.method == "draft_model"),
            f"speculative method={self.method!r} with model={self.model!r}: the method 'draft_model' needs a model, "
            "the others have none",
        )
        numbers = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        _require_integers(self, *numbers)
        for name in numbers:
            _require(getattr(self, name) is not None, f"{name}=None: expected a whole number")
        _require(
            1 <= self.num_speculative_tokens <= 31,
            f"num_speculative_tokens={self.num_speculative_tokens}: expected 1 to 31",
        )
        _require(
            1 <= self.prompt_lookup_min <= self.prompt_lookup_max,
            f"prompt_lookup_min={self.prompt_lookup_min}, prompt_lookup_max={self.prompt_lookup_max}: expected "
            "1 <= prompt_lookup_min <= prompt_lookup_max",
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SpeculativeConfig:
        """Makes it from a mapping; a key that is not known is an error."""
        _require(
            isinstance(values, Mapping),
            f"speculative_config={values!r:.60}: expected a mapping such as {{'method': 'ngram'}}",
        )
        unknown = set(values) - {field.name for field in fields(cls)}
        _require(
            not unknown,
            f"speculative_config has unknown keys {sorted(map(str, unknown))}: expected {[f.name for f in fields(cls)]}",
        )
        return cls(**values)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is built from.

    Attributes:
        cache, scheduler: see there.
        seed: seeds requests that bring no seed of their own.
        overlap: prepare step n+1 on the host while the device runs step n.
        check_every_step: verify the invariants of pages and sequences after each step (slow; for tests and debugging).
        fused_qkv: store the query, key and value projections as one matrix per layer.
        speculative: propose tokens; None computes them one by one.
        logprobs_mode: one of LOGPROBS_MODES, for new tokens; those of prompts are always the model's own.
        numerics: one of NUMERICS: "invariant" gives a token the same bits in any company.
    """

    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    seed: int = 0
    overlap: bool = True
    check_every_step: bool = False
    fused_qkv: bool = True
    speculative: SpeculativeConfig | None = None
    logprobs_mode: str = LOGPROBS_MODES[0]
    numerics: str = NUMERICS[0]

    def __post_init__(self) -> None:
        _require(
            self.logprobs_mode in LOGPROBS_MODES,
            f"logprobs_mode={self.logprobs_mode!r:.60}: expected one of {', '.join(LOGPROBS_MODES)}",
        )
        _require(self.numerics in NUMERICS, f"numerics={self.numerics!r:.60}: expected one of {', '.join(NUMERICS)}")
        _require_integers(self, "seed")
        _require_switches(self, "overlap", "check_every_step", "fused_qkv")
        _require(self.seed >= 0, f"seed={self.seed}: expected 0 or more")

    def one_group(self) -> EngineConfig:
        """Returns these settings for a model all of whose layers keep their pages, as a draft model's do."""
        return replace(self, cache=replace(self.cache, disable_hybrid_kv_cache_manager=True))
