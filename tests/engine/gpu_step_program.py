"""Compiles the engine's step of a two-layer Llama 8B for an H200, prints memory and temporaries as JSON. In its own process."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llm_infer.config import NUMERICS
from llm_infer.decoding.features import PLAIN
from llm_infer.engine.platform import compiler_options, layer_loop, query_rows
from llm_infer.engine.step.layout import StepLayout
from llm_infer.engine.step.paged import Paging
from llm_infer.engine.step.state import PAGES, StepInputs, StepState
from llm_infer.engine.step.step import make_step
from llm_infer.kvcache.groups import one_group
from llm_infer.models.architectures import read_architecture
from llm_infer.models.params import abstract_params, split_model
from llm_infer.models.registry import family
from pallas_kernels import dispatch
from pallas_kernels.numerics import numerics
from pallas_kernels.paged_attention import kv_pool_dtype, kv_pool_shape
from pallas_kernels.paged_attention.plan import PlanShape
from pallas_kernels.targets import TARGETS, make_mesh

PAGE_SIZE, NUM_PAGES = 64, 8192
architecture = {**read_architecture("llama-3.1-8b"), "num_hidden_layers": 2}
config = family(architecture).config(architecture, fused_qkv=True)
definition, _ = split_model(config, jnp.bfloat16)
params = abstract_params(config, jnp.bfloat16)
target = TARGETS["sm_90"]
mesh = make_mesh(target)
replicated = NamedSharding(mesh, PartitionSpec())
array = jax.ShapeDtypeStruct
sizes = dict(num_layers=2, page_size=PAGE_SIZE, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
shape = kv_pool_shape("gpu", num_pages=NUM_PAGES, dtype=jnp.bfloat16, **sizes)
pool = array(shape, kv_pool_dtype("gpu", jnp.bfloat16))
found = {}
tokens = 8
for how in NUMERICS:
    rows = min(tokens, query_rows("gpu", config.num_heads // config.num_kv_heads))
    layout = StepLayout(PlanShape(tokens, min(tokens, 64), 4096 // PAGE_SIZE, rows))
    step = make_step(definition, layout, PLAIN, Paging(one_group(2), PAGE_SIZE), loop=layer_loop(target.platform))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert dispatch.target() == ("gpu", target.device_kind)
        options = compiler_options("gpu", params, how)
        jitted = jax.jit(
            step, donate_argnums=1, in_shardings=replicated, out_shardings=replicated, compiler_options=options
        )
        state, inputs = (
            StepState({PAGES: pool}, array((1, 65), jnp.int32)),
            StepInputs(array((1, layout.size), jnp.int32)),
        )
        arguments = params, state, inputs
        with numerics(how):
            compiled = jitted.lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found[how] = {
        "alias": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "waits": text.count(" while(") + text.count(" conditional("),
        "triton products": text.count("gemm_fusion"),
        "ours": [
            name in text
            for name in ("write_kv_bfloat16_128", "paged_attention_bfloat16_128", "copy_pages", "draw_tokens")
        ],
        "fixed order": [name in text for name in ("grouped_matmul_bfloat16", "row_sums_squares")],
        "cublas": text.count("__cublas"),
    }
matrices = [2 * math.prod(spec.shape[1:]) for spec in params.values() if len(spec.shape) == 3]
print(json.dumps({"pool": 2 * math.prod(shape), "smallest_matrix": min(matrices), "steps": found}))
