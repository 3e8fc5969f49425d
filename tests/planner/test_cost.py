"""The closed-form memory estimate agrees with the shapes of the models themselves."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from llm_infer.models.architectures import architecture_config, architecture_names
from llm_infer.models.params import split_model
from llm_infer.planner.cost import Cut, StepSize, estimate, page_bytes, weights_of_device
from tests.models.closed_form import num_parameters


@pytest.mark.parametrize("name", architecture_names())
def test_weights_of_one_device_are_all_parameters(name: str) -> None:
    config = architecture_config(name)
    assert weights_of_device(config) == num_parameters(config)


def test_what_is_cut_and_what_is_copied() -> None:
    config = architecture_config("llama-3.1-8b")  # 32 query heads, 8 KV heads
    _, specs = split_model(config)
    sizes = {key: math.prod(spec.shape) for key, spec in specs.items()}
    norms = sum(size for key, size in sizes.items() if "norm" in key)
    assert weights_of_device(config, Cut(tp=8)) == (num_parameters(config) - norms) // 8 + norms
    # With 16 devices each KV head is on two of them.
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * config.hidden_size
    assert weights_of_device(config, Cut(tp=16)) == (num_parameters(config) - norms + kv) // 16 + norms
    assert weights_of_device(config, Cut(dp=4)) == num_parameters(config)
    assert page_bytes(config, Cut(tp=16), "cpu", 16, "float32") == 32 * 2 * 16 * 128 * 4
    assert page_bytes(config, Cut(tp=16), "cpu", 16, "int8") == 32 * 2 * 16 * (128 + 4)


def test_experts_are_cut_both_ways() -> None:
    config = architecture_config("qwen3-30b-a3b")
    assert config.moe is not None
    experts = config.num_layers * config.moe.num_experts * 3 * config.moe.intermediate_size * config.hidden_size
    whole, by_expert = weights_of_device(config), weights_of_device(config, Cut(ep=4))
    assert weights_of_device(config, Cut(tp=2, ep=2)) == by_expert
    assert experts * 3 // 4 < whole - by_expert < experts


def test_the_estimate_adds_up() -> None:
    config, step = architecture_config("llama-3.1-8b"), StepSize(2048, 64, 100_000, 64)
    one = page_bytes(config, Cut(), "cpu", 16, "float32")
    small, large = (estimate(config, Cut(), step, num_pages=n, bytes_of_page=one) for n in (0, 100))
    assert large.total - small.total == large.pages == 100 * one
    assert small.weights == 2 * num_parameters(config)


def test_importing_it_does_not_import_jax() -> None:
    program = "import sys, llm_infer.planner.cost; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
