"""The Mosaic GPU decode kernel: shared cases in the interpreter with race detection, its twins' originals, and the compiler."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Case, choose
from pallas_kernels.gpu_resources import mosaic_variables, read_mosaic_dump
from pallas_kernels.paged_attention import gpu_mosaic
from pallas_kernels.paged_attention.cases import CASES, AttentionCase, build
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.targets import TARGETS, why_not
from tests.kernels.test_gpu_triton import compiled, expected_pages
from tests.kernels.test_paged_attention import num_rows, textbook

OLD = jax.__version_info__ < gpu_mosaic.OLDEST_JAX
needs_new_jax = pytest.mark.skipif(OLD, reason="Mosaic GPU kernels need jax 0.11: Triton serves")


def check(case: AttentionCase) -> None:
    inputs = build(case)
    call = functools.partial(by_keyword(gpu_mosaic.paged_attention), scale=inputs.scale, split_keys=64, interpret=True)
    out, pages = jax.jit(functools.partial(call, **inputs.options))(
        inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan, **inputs.arrays
    )
    rows, expected = num_rows(case), textbook(case, inputs)
    np.testing.assert_allclose(np.asarray(out)[:rows].astype(np.float64), expected, rtol=1e-2, atol=1e-2)
    assert (np.asarray(out)[rows:] == 0).all()
    np.testing.assert_array_equal(np.asarray(pages).view("u2"), expected_pages(case, inputs).view("u2"))


@needs_new_jax
@pytest.mark.parametrize("name", ["bf16_decode", "bf16_mixed_everything"])
def test_interpreted_kernel_is_the_textbook(name: str) -> None:
    check(CASES[name])


@needs_new_jax
@pytest.mark.sweep
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "page_size"), [(2, 64), (6, 128), (18, 64), (32, 128)])
def test_interpreted_kernel_is_the_textbook_everywhere(heads: int, page_size: int, head_dim: int) -> None:
    case = CASES["bf16_decode"]
    check(replace(case, sizes=replace(case.sizes, num_heads=heads, page_size=page_size, head_dim=head_dim)))


def case_of(**changes) -> Case:
    shapes = {"q": (64, 32, 128), "k_new": (64, 8, 128), "pages": (4, 9, 2, 8, 64, 128)}
    dtypes = {"q": "bfloat16", "pages": "bfloat16"}
    scales, device = changes.pop("kv_scales", False), changes.pop("device", "NVIDIA H200")
    for name, value in changes.items():
        (dtypes if isinstance(value, str) else shapes)[name] = value
    return Case("gpu", device, shapes, dtypes, {"kv_scales": scales})


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (case_of(), None),
        (case_of(device="NVIDIA H100 80GB HBM3"), None),
        (case_of(device="NVIDIA B200"), "written for compute capability 9.0, not for NVIDIA B200"),
        (case_of(pages="float8_e4m3fn"), "bfloat16 or float16 pages with queries of their type"),
        (case_of(q="float32"), "found float32 and bfloat16"),
        (case_of(kv_scales=True), "has no scales"),
        (case_of(pages=(4, 9, 2, 8, 16, 128)), "takes page sizes 64 and 128, found 16"),
        (case_of(pages=(4, 9, 2, 8, 64, 80), k_new=(64, 8, 80)), "head sizes 64 and 128, found 80"),
        (case_of(q=(64, 8 * 71, 128)), "found 71"),
        (case_of(q=(512, 32, 128)), "steps of up to 256 tokens, found 512"),
    ],
)
def test_dispatch_says_what_it_can_run(case: Case, reason: str | None) -> None:
    """Where it cannot, the Triton kernel takes the case."""
    choice = choose("paged_attention", case)
    said = dict(choice.reasons)["gpu_mosaic"]
    if OLD:
        assert "needs jax 0.11" in said and choice.name == "gpu_triton"
    elif reason is None:
        assert choice.name == "gpu_mosaic"
    else:
        assert reason in said and choice.name == "gpu_triton"


@needs_new_jax
def test_wgmma_of_the_originals_in_the_interpreter() -> None:
    """What the twins replace, in the form that the interpreter has: both operands in shared memory, sums from zero."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(a_ref, b_ref, out_ref, a_smem, b_smem, out_smem, ready):
        plgpu.copy_gmem_to_smem(a_ref, a_smem, ready.at[0])
        plgpu.copy_gmem_to_smem(b_ref, b_smem, ready.at[1])
        plgpu.barrier_wait(ready.at[0])
        plgpu.barrier_wait(ready.at[1])

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a_smem, b_smem)
            return acc_ref[...]

        out_smem[...] = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref)
        plgpu.wait_smem_to_gmem(0)

    tiling = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    a, b = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in range(2))
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[
            *(plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tiling),) * 2,
            plgpu.SMEM((64, 64), jnp.float32),
            plgpu.Barrier(num_barriers=2),
        ],
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )(a, b)
    expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-5)


PROGRAMS = {
    # name: (tokens, page dtype, head size, page size, query heads, KV heads)
    "decode": (64, "bfloat16", 128, 64, 32, 8),
    "decode_head_64": (8, "bfloat16", 64, 128, 14, 2),
}


@needs_new_jax
def test_compiles_for_hopper_in_place_without_spills(tmp_path: Path) -> None:
    reason = why_not(TARGETS["sm_90"])
    if reason is not None:
        pytest.skip(reason)
    memory = compiled(PROGRAMS, "gpu_mosaic", mosaic_variables(tmp_path))
    for name in PROGRAMS:
        assert memory[name]["alias"] >= memory[name]["pool"], name
        assert memory[name]["temporary"] < memory[name]["pool"] / 20, (name, memory[name])
    kernels = read_mosaic_dump(tmp_path, threads=256)
    assert len(kernels) == len(PROGRAMS)
    for kernel in kernels:
        assert kernel.spill_bytes == 0 and 64 < kernel.registers <= 255, kernel
        assert kernel.shared_bytes <= TARGETS["sm_90"].scratch_bytes and kernel.blocks_per_multiprocessor >= 1, kernel


@needs_new_jax
def test_tables_are_not_a_slice_of_the_inputs() -> None:
    """XLA would hand over the slice as it lies, and on an H200 the kernel refused its address: not 256-byte aligned."""
    inputs = build(CASES["bf16_decode"])
    call = functools.partial(
        by_keyword(gpu_mosaic.paged_attention), scale=inputs.scale, interpret=True, **inputs.options
    )
    jaxpr = jax.make_jaxpr(call)(inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan, **inputs.arrays)
    (inner,) = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if "jaxpr" in eqn.params]
    tables = inputs.plan.block_tables.shape
    (kernel,) = [
        eqn for eqn in inner.eqns if len(eqn.outvars) == 2 and tables in [var.aval.shape for var in eqn.invars]
    ]
    assert not [var.aval for var in inner.invars if var in kernel.invars]
