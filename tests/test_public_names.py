"""What `import llm_infer` shows: every public name is there, is found by completion, and costs nothing until it is used."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import llm_infer
from llm_infer.base import errors, outputs


def test_results_and_errors_are_all_public() -> None:
    kinds = (dataclasses.is_dataclass, lambda kind: isinstance(kind, type) and issubclass(kind, errors.UserError))
    for module, is_public in zip((outputs, errors), kinds, strict=True):
        for name, value in inspect.getmembers(module, is_public):
            assert name in llm_infer.__all__ and getattr(llm_infer, name) is value


def test_every_name_is_there_and_in_dir() -> None:
    assert llm_infer.__all__ == sorted(llm_infer.__all__, key=lambda name: (not name.isupper(), name))
    for name in llm_infer.__all__:
        assert getattr(llm_infer, name).__name__ == name and name in dir(llm_infer)
    scope: dict[str, object] = {}
    exec("from llm_infer import *", scope)
    assert set(llm_infer.__all__) <= scope.keys()
    with pytest.raises(AttributeError, match="module 'llm_infer' has no attribute 'LMM'"):
        llm_infer.LMM  # noqa: B018


def test_importing_loads_no_jax() -> None:
    code = "import sys, llm_infer; dir(llm_infer); llm_infer.SamplingParams, llm_infer.EngineOptions, llm_infer.UserError\n"
    code += "assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "llm_infer", "generate", "Hi", "--temperature", "-1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: temperature=-1.0") and result.stderr.count("\n") == 1
