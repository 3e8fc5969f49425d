"""Every form of the loop over layers computes each layer once and in order, also where four do not divide their number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.models.decoder import Layer, LayerLoop
from llm_infer.models.params import merge_model, split_model
from tests.models.family_checkpoints import dense_attend, load

FORMS: tuple[LayerLoop, ...] = (1, 4, "unroll")


@pytest.mark.parametrize("layers", [1, 3, 4, 6])
def test_all_forms_give_the_same_numbers(layers: int) -> None:
    definition, specs = split_model(replace(load("llama_gqa").config, num_layers=layers))
    rng = np.random.default_rng(layers)
    params = {name: jnp.asarray(rng.normal(0, 0.3, spec.shape), spec.dtype) for name, spec in specs.items()}
    ids = jnp.asarray([3, 1, 4, 1, 5], jnp.int32)

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, cache: jax.Array, layer: Layer, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        out, _ = dense_attend(query, key, value, None, layer, **options)
        before = jnp.max(cache)  # layers that were computed
        return out, cache.at[layer].set(10 * cache[layer] + before + 1)

    def run(loop: LayerLoop) -> tuple[np.ndarray, list[int]]:
        def model(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            cache = jnp.zeros(layers, jnp.int32)
            return merge_model(definition, params)(ids, jnp.arange(5, dtype=jnp.int32), cache, attend, loop=loop)

        hidden, order = jax.jit(model)(params)
        return np.asarray(hidden), order.tolist()

    found = {loop: run(loop) for loop in FORMS}
    for loop in FORMS:
        hidden, order = found[loop]
        assert order == list(range(1, layers + 1)), loop
        np.testing.assert_allclose(hidden, found[1][0], rtol=1e-5, atol=1e-5)
    assert np.abs(found[1][0]).std() > 0.01
