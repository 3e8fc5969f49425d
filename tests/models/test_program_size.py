"""The compiled program and its arguments do not grow with the number of layers."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llm_infer.models.config import ModelConfig
from llm_infer.models.params import abstract_params, merge_model, split_model
from tests.models.family_checkpoints import dense_attend, load


def lower(config: ModelConfig) -> jax.stages.Lowered:
    definition, _ = split_model(config)

    def run(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        model = merge_model(definition, params)
        hidden, _ = model(ids, jnp.arange(len(ids), dtype=jnp.int32), None, dense_attend)
        return model.logits(hidden)

    return jax.jit(run).lower(abstract_params(config), jax.ShapeDtypeStruct((4,), jnp.int32))


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3_moe_gqa", "opt_post"])
def test_arguments_and_program_are_independent_of_depth(name: str) -> None:
    config = load(name).config
    shallow, deep = (lower(replace(config, num_layers=layers)) for layers in (2, 40))
    assert len(jax.tree.leaves(shallow.in_avals)) == len(jax.tree.leaves(deep.in_avals)) <= 20
    sizes = [len(lowered.as_text().splitlines()) for lowered in (shallow, deep)]
    assert sizes[0] == sizes[1]
