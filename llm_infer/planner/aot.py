"""Compiles an engine's step for devices that are not here, and says what the compiled program takes and does.

Runs in a process that was started with `pallas_kernels.targets.environment(target)`; `llm-infer bench aot` does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llm_infer.base.errors import UserError
from llm_infer.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from llm_infer.decoding.features import PLAIN
from llm_infer.engine.memory import device_bytes, local_bytes
from llm_infer.engine.page_count import UTILIZATION
from llm_infer.engine.programs import StepPrograms
from llm_infer.engine.step.sharding import StepSharding
from llm_infer.models.config import ModelConfig
from llm_infer.models.params import split_model
from llm_infer.models.sharded import Placement, abstract_parameters, place_over
from llm_infer.parallel.mesh import make_mesh
from llm_infer.planner.cost import Cut, MemoryEstimate, StepSize, estimate, page_bytes, pages_beside_weights
from llm_infer.planner.hlo import read_work
from pallas_kernels import targets
from pallas_kernels.targets import Target


@dataclass(frozen=True, slots=True)
class Compiled:
    """Memory and work of a step program for a chip, per device.

    Attributes:
        tokens: T of the program.
        num_pages: pages of a data-parallel shard.
        estimated: memory by the closed form.
        total_bytes, temporary_bytes, aliased_bytes: from the compiler's memory analysis.
        collectives: number of runs of each kind per step.
        largest_copy: bytes of the largest array that is copied.
        megacycles: the compiler's estimate of a step without the sampler's rare branches; None where it gives none.
        compile_seconds, compile_cpu_seconds: time of lowering and compiling; on a busy machine only the second means much.
    """

    tokens: int
    num_pages: int
    estimated: MemoryEstimate
    total_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    collectives: Mapping[str, int]
    largest_copy: int
    megacycles: float | None
    compile_seconds: float
    compile_cpu_seconds: float


def abstract_steps(
    config: ModelConfig,
    parallel: ParallelConfig,
    devices: Sequence[Any],
    engine: EngineConfig,
    dtype: str = "bfloat16",
) -> StepPrograms:
    """Makes the step programs of a model without weights, on devices that may be here or not.

    Args:
        config: configuration of the whole model.
        parallel: numbers of devices to cut it over.
        devices: devices of this machine, or those of `targets.devices`.
        engine: limits and cache settings.
        dtype: type of weights and pages.

    Raises:
        UserError: the model cannot be cut so, or there are too few devices.
    """
    # One device has a mesh too: it says what to compile for.
    placement = place_over(config, parallel, devices) or Placement(config, make_mesh(parallel, devices))
    definition, specs = split_model(placement.config, dtype)
    return StepPrograms(
        definition,
        placement.config,
        abstract_parameters(specs, placement),
        engine,
        StepSharding.of(placement.config, placement.mesh),
        jnp.dtype(dtype),
        engine.scheduler.max_model_len or config.max_position_embeddings,
        smallest_batch=2,
    )


def compile_step(
    config: ModelConfig,
    target: Target,
    *,
    topology: str | None = None,
    parallel: ParallelConfig | None = None,
    tokens: int,
    max_num_seqs: int = 64,
    max_model_len: int = 8192,
    page_size: int = 64,
    num_pages: int | None = None,
    dtype: str = "bfloat16",
) -> Compiled:
    """Compiles the plain step of `tokens` tokens.

    Args:
        config: configuration of the whole model.
        target: the chip.
        topology: topology of the slice, such as "2x4"; None is the smallest.
        parallel: numbers of devices to cut it over.
        tokens: T; `max_num_seqs` for a decode step.
        num_pages: pages of a shard; None takes as many as fit UTILIZATION of the memory by the closed form.
        dtype: type of weights and pages.

    Raises:
        UserError: the model cannot be cut so, or the slice or its memory is too small; the message says by how much.
    """
    parallel = parallel or ParallelConfig()
    try:
        devices = targets.devices(target, topology)
    except ValueError as error:
        raise UserError(str(error)) from None
    cut = Cut(parallel.data_parallel_size, parallel.tensor_parallel_size, parallel.expert_parallel_size)
    scheduler = SchedulerConfig(max_num_seqs, max(tokens, max_num_seqs), max_model_len)
    programs = abstract_steps(
        config, parallel, devices, EngineConfig(CacheConfig(page_size=page_size), scheduler), dtype
    )
    layout = programs.layout(tokens)
    size = StepSize(tokens, layout.num_draws, layout.size, max_num_seqs, local_bytes(programs.states()))
    one_page = page_bytes(config, cut, target.platform, page_size, dtype, programs.groups.depth)
    budget = int(target.memory_bytes * UTILIZATION)
    fits = pages_beside_weights(config, cut, size, budget, one_page)
    pages = min(fits, programs.most_pages) if num_pages is None else num_pages
    expected = estimate(config, cut, size, num_pages=max(2, pages), bytes_of_page=one_page)
    if pages < 2:
        raise UserError(
            f"a step takes {expected.total / 1e9:.1f} GB per device with 2 pages ({expected.weights / 1e9:.1f} GB of weights); "
            f"{UTILIZATION:.0%} of the memory of {target.name} is {budget / 1e9:.1f} GB: short by "
            f"{(expected.total - budget) / 1e9:.1f} GB"
        )
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
        compiled = programs.lower(tokens, PLAIN, pages).compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(_refusal(str(error))) from None
    elapsed, cpu_elapsed = time.perf_counter() - started, time.process_time() - cpu_started
    analysis = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"jax {jax.__version__} cannot read the programs of this compiler ({str(error).splitlines()[0]:.100}): "
            f"install the one that belongs to it, pip install 'jax[tpu]=={jax.__version__}'"
        ) from None
    assert analysis is not None and text is not None
    work = read_work(text)
    return Compiled(
        tokens,
        pages,
        expected,
        device_bytes(compiled),
        analysis.temp_size_in_bytes,
        analysis.alias_size_in_bytes,
        dict(work.collectives),
        max(work.copies, default=0),
        work.cycles / 1e6 or None,
        elapsed,
        cpu_elapsed,
    )


def _refusal(message: str) -> str:
    """Returns the sentence of a compiler's refusal that says what is short."""
    said = [line.strip() for line in message.splitlines() if "capacity" in line or "RESOURCE_EXHAUSTED" in line]
    return f"the compiler refuses it: {(said or [message.splitlines()[0]])[0]:.300}"
