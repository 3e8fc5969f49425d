"""`llm-infer bench host`: measures the host's time per decode step (schedule, prepare, dispatch) when the device takes none."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.programs import described
from llm_infer.engine.runner import Runner, StepProgram
from llm_infer.engine.step.state import StepInputs, StepState
from llm_infer.models.architectures import architecture_config, architecture_names
from llm_infer.models.load import LoadedModel, dummy_model
from llm_infer.models.params import split_model

PROMPT, WARM_UP, STEPS, CONTEXT = 64, 8, 200, 4096


class IdleRunner(Runner):
    """A runner whose programs have the real ones' arguments and draw token 0 without looking at them."""

    def compile(self, bucket: int, features: StepFeatures = PLAIN) -> StepProgram:
        """Makes the idle program of a bucket."""
        layout = self.step_programs.layout(bucket, features)

        def step(params: Any, state: StepState, inputs: StepInputs) -> tuple[StepState, dict[str, Any]]:
            return state, {"ids": jnp.zeros((1, layout.num_draws), jnp.int32)}

        if (bucket, features) not in self._programs:
            params = jax.tree.map(described, self.model.params)
            state, inputs = (
                self.step_programs.state(features, self.num_pages),
                self.step_programs.inputs(bucket, features),
            )
            jitted = jax.jit(step, donate_argnums=1, keep_unused=True)  # else XLA would drop the parameters
            run = jitted.lower(params, state, inputs).compile()
            self._programs[bucket, features] = StepProgram(layout, features, state, inputs, run, None)
        return self._programs[bucket, features]


def run(sizes: tuple[int, ...], json_file: str | None) -> None:
    """Measures and prints a line for each number of sequences, and the jit arguments of every family."""
    report = {f"sequences_{size}": measure(size) for size in sizes}
    print(f"milliseconds of a decode step on the host, medians of {STEPS} steps (least in brackets)")
    for size, found in zip(sizes, report.values(), strict=True):
        parts = ", ".join(f"{name} {ms[0]:.2f} ({ms[1]:.2f})" for name, ms in found.items())
        print(f"{size:>5} sequences: {parts}")
    arguments = jit_arguments()
    print("jit arguments: " + ", ".join(f"{name} {count}" for name, count in sorted(arguments.items())))
    if json_file:
        Path(json_file).write_text(json.dumps({**report, "jit_arguments": arguments}, indent=2) + "\n")


def measure(size: int) -> dict[str, tuple[float, float]]:
    """Returns the median and least milliseconds of each part of a step, and of all that comes before the device."""
    model = _small_model()
    config = EngineConfig(
        CacheConfig(num_pages=1 + size * 32), SchedulerConfig(size, max(512, size), max_model_len=CONTEXT)
    )
    engine = Engine(model, config)
    engine.runner = IdleRunner(model, config, num_pages=1 + size * 32, max_model_len=CONTEXT)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=STEPS + 4 * WARM_UP + size, ignore_eos=True)
    for _ in range(size):
        engine.add_request(rng.integers(0, model.config.vocab_size, PROMPT).tolist(), params)
    while engine.scheduler.num_running < size:
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    rows = []
    for _ in range(STEPS):
        before = _times(engine)
        engine.step()
        rows.append([1e3 * (now - then) for now, then in zip(_times(engine), before, strict=True)])
    columns = dict(zip(("schedule", "prepare", "dispatch", "commit"), zip(*rows, strict=True), strict=True))
    columns = {"before the device": tuple(sum(row[:3]) for row in rows), **columns}
    return {name: (statistics.median(values), min(values)) for name, values in columns.items()}


def jit_arguments() -> dict[str, int]:
    """Counts the arrays that each family's step takes: parameters, pages, last ids and the packed plan."""
    found: dict[str, int] = {}
    for name in architecture_names():
        config = architecture_config(name)
        found[config.architecture] = max(found.get(config.architecture, 0), len(split_model(config)[1]) + 3)
    return found


def _times(engine: Engine) -> tuple[float, float, float, float]:
    times = engine.runner.times
    return engine.times.schedule, times.prepare, times.dispatch, engine.times.commit


def _small_model() -> LoadedModel:
    """Makes a model with as many parameter arrays as a large one, all small."""
    config = architecture_config("llama-3.2-1b")
    small = {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 64}
    return dummy_model(replace(config, vocab_size=256, **small))
