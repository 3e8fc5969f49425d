"""Precision `fast` of the default model stays close to the exact one: teacher-forced along transformers' greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_infer.base.progress import Progress
from llm_infer.bench.quality import PAGE_DTYPES, TeacherForced, compare
from llm_infer.models.load import LoadedModel, load_model
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve
from pallas_kernels import cpu_ffi
from tests.golden_tokens import load_goldens

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(cpu_ffi.why_not() is not None, reason=f"native CPU kernels: {cpu_ffi.why_not()}"),
]
GOLDENS = load_goldens()
LENGTH = 192
SHORT = [i for i, prompt in enumerate(GOLDENS.prompts) if len(prompt) + 64 <= LENGTH]


@pytest.fixture(scope="module")
def models(default_gguf: Path) -> dict[str, LoadedModel]:
    return {name: load_model(open_model(resolve(str(default_gguf))), stored=name) for name in PAGE_DTYPES}


def log_probabilities(models: dict[str, LoadedModel], which: list[int]) -> tuple[np.ndarray, ...]:
    """Exact and fast log-probabilities [N, V] before each golden token, and the golden tokens [N]."""
    forced = {name: TeacherForced(model, PAGE_DTYPES[name], LENGTH) for name, model in models.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for i in which:
        tokens = GOLDENS.prompts[i] + GOLDENS.tokens[i].tolist()
        for name, run in forced.items():
            found[name].append(run(tokens)[len(GOLDENS.prompts[i]) - 1 : -1])
    return *(np.concatenate(found[name]) for name in ("exact", "fast")), GOLDENS.tokens[which].reshape(-1)


def check(models: dict[str, LoadedModel], which: list[int]) -> None:
    exact, fast, golden = log_probabilities(models, which)
    assert (exact.argmax(-1) == golden).all()
    agreement = float((fast.argmax(-1) == golden).mean())
    kl = float((np.exp(exact) * (exact - fast)).sum(-1).mean())
    rows = np.arange(len(golden))
    change = float(np.exp(exact[rows, golden].mean() - fast[rows, golden].mean())) - 1
    print(
        f"{len(golden)} golden tokens: top-1 agreement {agreement:.2%}, mean KL {kl:.5f} nat, perplexity {change:+.3%}"
    )
    assert agreement >= 0.97 and kl < 0.01 and change <= 0.005
    assert kl > 0  # the rounding happened


def test_some_goldens(models: dict[str, LoadedModel]) -> None:
    check(models, SHORT[::6])


def test_int8_pages_stay_close(models: dict[str, LoadedModel]) -> None:
    """They change few of the most likely tokens, and some probabilities: the rounding happened."""
    exact = models["exact"]
    texts = [GOLDENS.prompts[i] + GOLDENS.tokens[i].tolist() for i in SHORT[::6]]
    found = compare(exact, {"exact": exact}, texts, Progress.silent(), pages="int8")["exact"]
    print(found)
    assert found.top1_agreement >= 0.96 and 0 < found.mean_kl < 0.003 and abs(found.perplexity_change) < 0.005


@pytest.mark.sweep
def test_all_goldens(models: dict[str, LoadedModel]) -> None:
    check(models, SHORT)
