"""The engine's real step, compiled for chips that are not here: two all-reduces a layer, pages in place, nothing copied."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pytest

from llm_infer.bench.compiled.steps import BEGIN, END, Job, compile_all, merged, put_between_markers, table
from llm_infer.models.architectures import architecture_config
from llm_infer.planner.cost import Cut, weights_of_device
from pallas_kernels.targets import TARGETS, why_not

# The layers are a loop on TPUs: the program is as large at full depth as with four.
JOBS = {
    "dense decode": Job("llama-3.1-70b", "v6e:2x4", 64),
    "experts decode": Job("qwen3-30b-a3b", "tpu7x:2x2x1", 64),
}
MORE_JOBS = {
    "experts prefill": Job("qwen3-30b-a3b", "v5p:2x2x2", 2048),
    "prefill": Job("opt-13b", "v5p:2x2x2", 2048),
    "other groups": Job("llama-3.1-8b", "v5e:2x4", 64),
}


def compiled(*jobs: Job, limit: int = 0) -> list[dict[str, Any]]:
    for job in jobs:
        if (reason := why_not(TARGETS[job.chip])) is not None:
            pytest.skip(reason)
    if jax.__version_info__ < (0, 11) and not version("libtpu").startswith("0.0.42"):
        pytest.skip(f"jax {jax.__version__} cannot read what libtpu {version('libtpu')} compiles; newer versions can")
    return list(compile_all(list(jobs), limit))


@pytest.mark.parametrize(
    "job",
    [
        *(pytest.param(job, id=name) for name, job in JOBS.items()),
        *(pytest.param(job, id=name, marks=pytest.mark.sweep) for name, job in MORE_JOBS.items()),
    ],
)
def test_collectives_memory_and_copies_of_the_compiled_step(job: Job) -> None:
    (result,) = compiled(job)
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
    slow, large, odd, small = compiled(
        Job("llama-3.1-8b", "v5e:2x4", 64),
        Job("llama-3.1-70b", "v5e:2x4", 64),
        Job("llama-3.1-8b", "v5e:3x7", 64),
        Job("llama-3.1-8b", "v5e:2x2", 64),
        limit=3,
    )
    assert slow["refused"] == "given up after 3 s of CPU time"
    weights = 2 * weights_of_device(architecture_config("llama-3.1-70b"), Cut(tp=8)) / 1e9
    assert f"({weights:.1f} GB of weights)" in large["refused"] and "short by" in large["refused"]
    assert "the nearest is '4x4'" in odd["refused"]
    assert "needs 8 devices" in small["refused"]


def test_a_table_keeps_the_rows_of_other_programs(tmp_path: Path) -> None:
    def rows(*results: tuple[str, int]) -> str:
        job = Job("opt-13b", "v6e:2x4", 64)
        return table([{**asdict(job), "model": m, "tokens": t, "refused": f"{m} {t}"} for m, t in results])

    row = "| v6e:2x4 | qwen3-8b | decode 64 | 11.88 | 1.001 | 157 | 8193 | 1.000 | 2 | – | 38.9 | 5.8 | 24 |"
    file = tmp_path / "page.md"
    file.write_text(f"above\n{BEGIN}\n{merged('', row)}\n{END}\nbelow\n")
    for each in (("opt-13b", 64), ("llama-3.1-8b", 2048), ("opt-13b", 2048), ("opt-13b", 64)):
        put_between_markers(file, rows(each))
    text = file.read_text()
    assert text.startswith(f"above\n{BEGIN}\n| slice") and text.endswith(f"{END}\nbelow\n") and row in text
    assert [line.rpartition(": ")[2] for line in text.splitlines() if line.startswith("- ")] == [
        "opt-13b 64",
        "llama-3.1-8b 2048",
        "opt-13b 2048",
    ]
    put_between_markers(file, rows(("qwen3-8b", 64)))
    assert row not in file.read_text() and "qwen3-8b 64" in file.read_text()
