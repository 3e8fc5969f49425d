"""The mixture of experts against the obvious computation: every token through each of its experts."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.experts import ExpertsMLP, _blocks, block_rows, route

E, F, L = 16, 12, 2


def make(experts: int, chosen: int, *, normalise: bool = True) -> tuple[nnx.GraphDef, dict]:
    """The layer's definition and the shapes of its parameters."""
    moe = MoEConfig(experts, chosen, F, normalise)
    config = ModelConfig("Qwen3MoeForCausalLM", 32, E, L, 2, 2, 8, F, 64, moe=moe)
    return nnx.split(ExpertsMLP(config, dtype=jnp.float32))


def expected(mlp: ExpertsMLP, x: np.ndarray, layer: int) -> np.ndarray:
    """In float64, token by token."""
    moe = mlp.config
    router, gate, up, down = (
        np.asarray(m.weight[...][layer], np.float64) for m in (mlp.router, mlp.gate, mlp.up, mlp.down)
    )
    gate, up, down = gate.reshape(-1, F, E), up.reshape(-1, F, E), down.reshape(-1, E, F)
    out = np.zeros(x.shape)
    for t, token in enumerate(x.astype(np.float64)):
        scores = np.exp(router @ token)
        scores /= scores.sum()
        best = np.argsort(-scores, kind="stable")[: moe.experts_per_token]
        total = scores[best].sum() if moe.norm_topk_prob else 1.0
        for expert in best:
            g = gate[expert] @ token
            out[t] += scores[expert] / total * (down[expert] @ (g / (1 + np.exp(-g)) * (up[expert] @ token)))
    return out


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "normalise"), [(2, 8, 2, True), (33, 8, 2, False), (70, 4, 4, True)]
)
def test_equals_the_obvious_computation(
    tokens: int, experts: int, chosen: int, normalise: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grouped:  # by XLA's product in the place of a GPU's kernel
        monkeypatch.setattr(ExpertsMLP, "_has_grouped_kernel", lambda *_: True)
    rng = np.random.default_rng(0)
    definition, specs = make(experts, chosen, normalise=normalise)
    params = jax.tree.map(lambda spec: (rng.standard_normal(spec.shape) * 0.25).astype(np.float32), specs)
    x = rng.standard_normal((tokens, E)).astype(np.float32)
    found = jax.jit(lambda params, x, layer: nnx.merge(definition, params)(x, layer))(params, x, jnp.int32(1))
    np.testing.assert_allclose(found, expected(nnx.merge(definition, params), x, 1), atol=2e-6)


def test_one_product_for_all_experts_adds_their_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    moe = MoEConfig(8, 3, F, router_bias=True, expert_biases=True)
    config = ModelConfig("GptOssForCausalLM", 32, E, L, 2, 2, 8, F, 64, moe=moe)
    definition, specs = nnx.split(ExpertsMLP(config, dtype=jnp.float32))
    params = jax.tree.map(lambda spec: rng.standard_normal(spec.shape).astype(np.float32), specs)
    x = jnp.asarray(rng.standard_normal((21, E)), jnp.float32)
    blocks = jax.jit(lambda params: nnx.merge(definition, params)(x, jnp.int32(1)))(params)
    monkeypatch.setattr(ExpertsMLP, "_has_grouped_kernel", lambda *_: True)
    grouped = jax.jit(lambda params: nnx.merge(definition, params)(x, jnp.int32(1)))(params)
    np.testing.assert_allclose(grouped, blocks, rtol=2e-5, atol=2e-5)


def test_what_is_added_to_the_sum_of_weights() -> None:
    """It shows where all scores are small."""
    logits = jnp.array([[-14.0, -15.0, -13.0]])
    config = MoEConfig(3, 2, F, scores="sigmoid", scale=2.0)
    plain, numbers = route(logits, config)
    raised, same = route(logits, replace(config, norm_epsilon=1e-6))
    scores = 1 / (1 + np.exp([13.0, 14.0]))
    np.testing.assert_allclose(plain[0], 2 * scores / scores.sum(), rtol=1e-6)
    np.testing.assert_allclose(raised[0], 2 * scores / (scores.sum() + 1e-6), rtol=1e-6)
    assert numbers.tolist() == same.tolist() == [[2, 0]]


def test_a_gpu_multiplies_with_all_experts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("Qwen3MoeForCausalLM", 32, E, L, 2, 2, 8, F, 64, moe=MoEConfig(8, 2, F))
    layer, x = ExpertsMLP(config, dtype=jnp.bfloat16), jnp.zeros((4, E), jnp.bfloat16)
    assert not layer._has_grouped_kernel(x, 8, 8)
    monkeypatch.setattr("pallas_kernels.dispatch.target", lambda: ("gpu", "NVIDIA H200"))
    assert layer._has_grouped_kernel(x, 8, 8)


@pytest.mark.parametrize("experts", [[3] * 11, [0, 1, 2, 3], [3, 3, 0, 3, 2, 0, 3, 3, 3]])
def test_blocks_hold_one_expert_each(experts: list[int]) -> None:
    rows, number = 4, 4
    bound = min(len(experts), -(-len(experts) // rows) + number)
    place, expert_of_block, count = _blocks(jnp.array(experts, jnp.int32), number, rows, bound)
    assert len(set(place.tolist())) == len(experts) and int(count) <= bound
    assert [int(expert_of_block[p // rows]) for p in place] == experts
    assert {p // rows for p in place.tolist()} == set(range(int(count)))


def test_block_rows() -> None:
    assert [block_rows(a, 8) for a in (2, 32, 40, 10**6)] == [4, 4, 8, 64]


def test_nothing_of_tokens_times_experts_times_width_is_made() -> None:
    definition, specs = make(64, 2)
    run = jax.jit(lambda params, x: nnx.merge(definition, params)(x, jnp.int32(0)))
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
    text = run.lower(shapes, jax.ShapeDtypeStruct((32, E), jnp.float32)).as_text()
    assert "while" in text and f"32x64x{E}" not in text and f"32x64x{F}" not in text
