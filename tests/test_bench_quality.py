"""`llm-infer bench quality`: its figures are those of the formulas, and what cannot be compared is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Progress
from llm_infer.bench import quality
from llm_infer.models.load import LoadedModel
from llm_infer.text.byte_tokenizer import byte_tokenizer
from tests.models.family_checkpoints import golden, load


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    return np.log(softmax(logits.astype(np.float64)))


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def test_forced_tokens_have_the_probabilities_that_transformers_gives() -> None:
    expected = golden("llama_gqa")
    forced = quality.TeacherForced(load("llama_gqa"), "float32", max(map(len, expected.prompts)))
    for prompt, logits in zip(expected.prompts, expected.logits, strict=True):
        np.testing.assert_allclose(forced(prompt), log_probabilities(logits), atol=2e-5)


def test_figures_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = {"reference": golden("llama_gqa").logits, "exact": golden("llama_mha").logits}
    logits["fast"] = [(8 * each).round() / 8 for each in logits["exact"]]
    texts = golden("llama_gqa").prompts

    def forced(model: Any, page_dtype: str, length: int) -> Callable[[list[int]], np.ndarray]:
        assert page_dtype == ("bfloat16" if model == "fast" else "float32") and length == 21
        return lambda tokens: log_probabilities(logits[model][texts.index(tokens)])

    monkeypatch.setattr(quality, "TeacherForced", forced)
    models: Any = {"exact": "exact", "fast": "fast"}
    reference: Any = "reference"
    found = quality.compare(reference, models, texts, Progress.silent())
    following = np.concatenate([text[1:] for text in texts])
    p, *others = (
        softmax(np.concatenate([each[:-1] for each in logits[name]])) for name in ("reference", "exact", "fast")
    )
    at = np.arange(len(following)), following
    for result, q in zip(found.values(), others, strict=True):
        assert result.tokens == len(following) == 28
        assert result.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()
        assert result.mean_kl == pytest.approx((p * np.log(p / q)).sum() / 28) and result.mean_kl > 0
        assert result.perplexity_reference == pytest.approx(np.exp(-np.log(p[at]).mean()))
        assert result.perplexity == pytest.approx(np.exp(-np.log(q[at]).mean()))
        assert result.perplexity_change == pytest.approx(np.exp(np.log(p[at] / q[at]).mean()) - 1)
    assert found["exact"] != found["fast"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Has `run` load a tiny model by these names, and compare nothing; returns what it loads."""
    sizes, loaded = {"coarse": 128, "whole": 128, "other": 127}, []

    def fake(name: str, *, precision: str, **_: Any) -> LoadedModel:
        loaded.append((name, precision))
        return replace(load("llama_gqa"), tokenizer=byte_tokenizer(sizes[name]))

    def compare(_: LoadedModel, models: dict[str, LoadedModel], *__: Any) -> dict[str, quality.Quality]:
        return {name: quality.Quality(53, 0.98, 0.001, 10.0, 10.1) for name in models}

    monkeypatch.setattr(quality, "load", fake)
    monkeypatch.setattr(quality, "compare", compare)
    return loaded


SHOWN = "53 tokens: top-1 agreement 98.00%, mean KL 0.00100 nat, perplexity 10.0000 → 10.1000 (+1.000%)"


def test_both_precisions_are_compared_with_a_reference(
    loads: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.run("coarse", "whole", None, 64, str(tmp_path / "figures"))
    assert loads == [("coarse", "exact"), ("whole", "exact"), ("coarse", "fast")]
    report = json.loads((tmp_path / "figures").read_text())
    assert report.keys() == {"model", "reference", "kv_cache_dtype", "exact", "fast"} and report["reference"] == "whole"
    assert capsys.readouterr().out.splitlines() == [f"exact: {SHOWN}", f"fast:  {SHOWN}"]


def test_other_pages_are_compared_in_both_precisions(
    loads: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    quality.run("whole", None, None, 64, None, "int8")
    assert loads == [("whole", "exact"), ("whole", "fast")]
    assert capsys.readouterr().out.splitlines() == [f"exact: {SHOWN}", f"fast:  {SHOWN}"]


def test_without_a_reference_fast_is_compared_with_exact(
    loads: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.run("whole", None, None, 64, str(tmp_path / "figures"))
    assert loads == [("whole", "exact"), ("whole", "fast")]
    report = json.loads((tmp_path / "figures").read_text())
    assert report.keys() == {"model", "reference", "kv_cache_dtype", "fast"} and report["reference"] == "whole"
    assert capsys.readouterr().out.splitlines() == [SHOWN]


def test_a_reference_with_other_tokens_is_refused(loads: list[tuple[str, str]]) -> None:
    with pytest.raises(UserError, match=r"other has another vocabulary than the model \(it has 127 tokens"):
        quality.run("coarse", "other", None, 16, None)
    assert len(loads) == 2  # nothing is loaded in vain


def test_texts_that_cannot_be_compared(loads: list[tuple[str, str]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--text missing\.txt: No such file"):
        quality.run("coarse", None, "missing.txt", 16, None)
    assert not loads
    (tmp_path / "text").write_text("a")
    with pytest.raises(UserError, match="expected at least two tokens of text, found 1"):
        quality.run("coarse", None, str(tmp_path / "text"), 16, None)
