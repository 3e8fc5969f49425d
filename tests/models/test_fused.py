"""Query, key and value projections put together and taken apart: as the loader does it, and back to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.base.errors import ModelError
from llm_infer.config import ParallelConfig
from llm_infer.models.fused import fuse, unfuse
from llm_infer.models.load import compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.models.params import Params, split_model
from llm_infer.models.sharded import arrange, cut_config, why_not
from llm_infer.quant.stored import StoredWeights, store_dense
from llm_infer.weights.sources import resolve
from tests.models.family_checkpoints import FOLDER, load

NAMES = ["llama_gqa", "qwen2_gqa", "phi3_gqa", "glm4_gqa", "opt_pre", "gpt_oss_gqa", "gemma3_gqa", "lfm2_gqa"]


def check_same(found: Params, expected: Params) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for one, other in zip(jax.tree.leaves(found[name]), jax.tree.leaves(values), strict=True):
            assert type(one) is type(other)
            np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_as_the_loader_does_it(name: str) -> None:
    together, apart = load(name), load(name, fused_qkv=False)
    found, config = fuse(apart.params, apart.config)
    assert config == together.config and list(found) == list(together.params)
    check_same(found, together.params)
    found, config = unfuse(together.params, together.config)
    assert config == apart.config and list(found) == list(apart.params)
    check_same(found, apart.params)
    assert fuse(together.params, together.config)[0] is together.params
    assert unfuse(apart.params, apart.config)[0] is apart.params
    host = {each: np.asarray(values) for each, values in together.params.items()}
    check_same(fuse(*unfuse(host, together.config))[0], host)
    assert found["embed.weight"] is together.params["embed.weight"]


def test_over_a_mesh() -> None:
    for tp in (2, 4, 8):
        cut = []
        for fused in (True, False):
            model, parallel = load("llama_gqa", fused_qkv=fused), ParallelConfig(tensor_parallel_size=tp)
            assert why_not(model.config, parallel) is None
            config = cut_config(model.config, parallel)
            specs = split_model(config)[1]
            cut.append(({n: arrange(np.asarray(v), specs[n].axes, config) for n, v in model.params.items()}, config))
        check_same(fuse(*cut[1])[0], cut[0][0])
        check_same(unfuse(*cut[0])[0], cut[1][0])


@pytest.mark.skipif(compute_dtype("auto", "exact")[1] is None, reason="needs the native CPU kernels")
def test_dense_matrices_of_the_native_kernels() -> None:
    opened = open_model(resolve(str(FOLDER / "qwen2_gqa")))
    together, apart = (load_model(opened, stored="exact", fused_qkv=fused) for fused in (True, False))
    assert isinstance(apart.params["layers.attn.q.weight"], StoredWeights)
    check_same(fuse(apart.params, apart.config)[0], together.params)
    check_same(unfuse(together.params, together.config)[0], apart.params)
    wide = {**apart.params, "layers.attn.k.weight": store_dense(jnp.zeros((2, 16, 32), jnp.float32))}
    with pytest.raises(ModelError, match="blocks of different kinds"):
        fuse(wide, apart.config)
    tiled = StoredWeights((jnp.zeros((2, 64, 34), jnp.uint8),), ("q8_0",), ((0, 0), (0, 1)), tiled=(True,))
    with pytest.raises(ModelError, match="tiled blocks"):
        unfuse({**together.params, "layers.attn.qkv.weight": tiled}, together.config)


def test_a_missing_projection() -> None:
    model = load("llama_gqa", fused_qkv=False)
    params = {name: values for name, values in model.params.items() if name != "layers.attn.k.weight"}
    with pytest.raises(ModelError, match=r"has no parameter layers\.attn\.k\.weight"):
        fuse(params, model.config)
