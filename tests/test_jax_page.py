"""docs/jax.md: its examples run, and import only the names that its tables promise."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import jax
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "jax.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
PUBLIC = ("llm_infer.functional", "llm_infer.train", "llm_infer.checkpoints")


def test_every_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(PAGE.parents[1])
    scope: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have them
        for example in EXAMPLES:
            exec(compile(example, f"{PAGE.name}: {example[:60]!r}", "exec"), scope)
    lines = capsys.readouterr().out.splitlines()
    assert "True" in lines and lines[-1] == "True"


def test_examples_import_promised_names_alone() -> None:
    imported = set()
    for node in (node for example in EXAMPLES for node in ast.walk(ast.parse(example))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_infer"):
            imported |= {(node.module, alias.name) for alias in node.names}
    for module, name in imported:
        assert module in ("llm_infer", *PUBLIC) and name in importlib.import_module(module).__all__, (module, name)


@pytest.mark.parametrize("module", PUBLIC)
def test_the_tables_have_every_name(module: str) -> None:
    """But those of results and types, which come out of the others."""
    section = PAGE.read_text().split(f"(`{module}`)")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)", section))
    kinds = {name for name in importlib.import_module(module).__all__ if name[0].isupper() and not name.isupper()}
    missing = set(importlib.import_module(module).__all__) - named - kinds
    assert missing <= {"load_model", "TUNIX_QWEN2"}, missing
