"""The measurement of host time runs the engine with idle programs; a step has few arguments whatever the family."""

from __future__ import annotations

import pytest

from llm_infer.bench import host


def test_parts_of_a_step_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "STEPS", 5)
    found = host.measure(4)
    assert all(0 < least <= median for median, least in found.values())
    assert found["before the device"][1] < sum(median for name, (median, _) in found.items() if name != "commit")


def test_jit_arguments_of_every_family_are_few() -> None:
    arguments = host.jit_arguments()
    assert {"LlamaForCausalLM", "OPTForCausalLM", "Qwen3MoeForCausalLM"} <= set(arguments)
    assert max(arguments.values()) <= 40
