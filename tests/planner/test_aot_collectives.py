"""The engine's real step, compiled for chips that are not here: two all-reduces a layer, pages in place, nothing copied."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import jax
import pytest

from llm_infer.bench.aot import Job, compile_all, table
from llm_infer.models.architectures import architecture_config
from llm_infer.planner.cost import Cut, weights_of_device
from pallas_kernels.targets import TARGETS, why_not

# Where the layers are a loop, the program is as large at full depth as with two layers.
JOBS = {
    "dense": Job("llama-3.1-70b", "v6e:2x4", 64),
    "experts": Job("qwen3-30b-a3b", "v5e:2x4", 64),
    "prefill": Job("opt-13b", "v5p:2x2x2", 2048),
}


def compiled(job: Job) -> dict[str, Any]:
    reason = why_not(TARGETS[job.slice.partition(":")[0]])
    if reason is not None:
        pytest.skip(reason)
    if jax.__version_info__ < (0, 11) and not version("libtpu").startswith("0.0.42"):
        pytest.skip(f"jax {jax.__version__} cannot read what libtpu {version('libtpu')} compiles; newer versions can")
    (result,) = compile_all([job])
    return result


@pytest.mark.parametrize("name", JOBS)
def test_collectives_memory_and_copies_of_the_compiled_step(name: str) -> None:
    job, result = JOBS[name], compiled(JOBS[name])
    assert "refused" not in result, result["refused"]
    config, parallel = job.config(), job.parallel()
    collectives = result["collectives"]
    # One more for the embedding, whose table is cut over the vocabulary, and the logits are gathered once.
    assert collectives == {"all-reduce": 2 * config.num_layers + 1, "all-gather": 1}
    assert result["estimated"]["pages"] <= result["aliased_bytes"] <= 1.001 * result["estimated"]["pages"]
    assert 0.95 < result["total_bytes"] / result["estimated_bytes"] < 1.05
    cut = Cut(1, parallel.tensor_parallel_size, parallel.expert_parallel_size)
    layer = 2 * (weights_of_device(config, cut) - 2 * config.vocab_size * config.hidden_size // cut.parts)
    assert result["largest_copy"] < layer / config.num_layers
    assert "| " + job.slice in table([result])


def test_what_cannot_be_is_refused_with_what_is_short_or_works() -> None:
    too_large = compiled(Job("llama-3.1-70b", "v5e:2x4", 64))["refused"]
    weights = 2 * weights_of_device(architecture_config("llama-3.1-70b"), Cut(tp=8)) / 1e9
    assert f"({weights:.1f} GB of weights)" in too_large and "short by" in too_large
    assert "the nearest is '4x4'" in compiled(Job("llama-3.1-8b", "v5e:3x7", 64))["refused"]
    assert "needs 8 devices" in compiled(Job("llama-3.1-8b", "v5e:2x2", 64))["refused"]
