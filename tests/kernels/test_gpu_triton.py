"""The Triton kernels of paged attention: the shared cases in Pallas' interpreter, and what the GPU compiler makes of them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.dispatch import Case
from pallas_kernels.gpu_resources import dump_flags, read_dump
from pallas_kernels.paged_attention import gpu_triton, gpu_units, paged_attention
from pallas_kernels.paged_attention.cases import CASES, GQA3, LAYER, AttentionCase, Inputs, build
from pallas_kernels.paged_attention.gpu_blocks import Blocks
from pallas_kernels.paged_attention.gpu_copy import copy_pages
from pallas_kernels.paged_attention.gpu_units import make_units, partial_slots
from pallas_kernels.paged_attention.gpu_write import round_half_even
from pallas_kernels.paged_attention.options import by_keyword
from pallas_kernels.paged_attention.pages import CPU_DTYPES
from pallas_kernels.paged_attention.plan import AttentionPlan, PlanShape, fill_plan, plan_fields
from pallas_kernels.targets import TARGETS, environment, why_not
from tests.kernels.test_paged_attention import num_rows, textbook

SMALL = Blocks(tile=16, keys=32, warps=4, stages=2, split_keys=64, max_splits=4, programs=3)
"""Blocks that give small cases several tiles, splits and units per thread block."""
H200 = AbstractDevice("NVIDIA H200", 132, "gpu")
DEFAULT = ("mixed", "empty_sequences", "no_sequences", "prefill_last_chunk", "everything", "window_of_one")
KINDS = ("mha_head_80", "gqa4_head_128_bf16_pages", "float8_pages_scales", "int8_pages_scales")


@functools.cache
def jitted(blocks: Blocks, softcap: float | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Equal sizes share a program: windows are traced."""
    call = functools.partial(by_keyword(gpu_triton.paged_attention), softcap=softcap, blocks=blocks, interpret=True)
    # Compiling takes longer than running.
    return jax.jit(call, static_argnames="scale", compiler_options={"xla_backend_optimization_level": 0})


def run(inputs: Inputs, blocks: Blocks = SMALL) -> tuple[np.ndarray, np.ndarray]:
    options = {"window": jnp.int32(inputs.options["window"])} if "window" in inputs.options else {}
    out, pages = jitted(blocks, inputs.options.get("softcap"))(
        *(inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan),
        scale=inputs.scale,
        **options,
        **inputs.arrays,
    )
    return np.asarray(out), np.asarray(pages)


def expected_pages(case: AttentionCase, inputs: Inputs) -> np.ndarray:
    """The pool with the step's rows in it."""
    pages, row = inputs.pages.copy(), 0
    for (q_len, kv_len), kv in zip(case.batch, inputs.history, strict=True):
        for position in range(kv_len - q_len, kv_len):
            page, offset = divmod(int(inputs.plan.write_slot[row]), case.sizes.page_size)
            pages[LAYER, page, :, :, offset] = kv[:, position]
            row += 1
    return pages


def check(case: AttentionCase, blocks: Blocks = SMALL) -> None:
    inputs = build(case)
    out, pages = run(inputs, blocks)
    rows, expected = num_rows(case), textbook(case, inputs)
    tolerance = 1e-2 if case.sizes.dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(out[:rows].astype(np.float64), expected, rtol=tolerance, atol=tolerance)
    assert (out[rows:] == 0).all()
    as_bytes = f"u{pages.dtype.itemsize}"
    np.testing.assert_array_equal(pages.view(as_bytes), expected_pages(case, inputs).view(as_bytes))


@pytest.mark.parametrize("name", [*DEFAULT, *KINDS])
def test_interpreted_kernel_is_the_textbook(name: str) -> None:
    check(CASES[name])


OTHERS = [
    name for name, case in CASES.items() if case.sizes.page_dtype not in CPU_DTYPES and name not in (*DEFAULT, *KINDS)
]
WITHOUT_SPLITS = Blocks(tile=32, keys=16, warps=4, stages=1, split_keys=64, max_splits=1, programs=0)


@pytest.mark.sweep
@pytest.mark.parametrize("blocks", [SMALL, WITHOUT_SPLITS, Blocks(64, 64, 4, 3, 256, 16, 8)])
@pytest.mark.parametrize("name", [*OTHERS, *DEFAULT, *KINDS])
def test_interpreted_kernel_is_the_textbook_everywhere(name: str, blocks: Blocks) -> None:
    check(CASES[name], blocks)


def test_large_buckets_split_only_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_units, "ALL_ROWS_SPLIT", GQA3.tokens - 1)
    jitted.cache_clear()
    check(CASES["mixed"])
    jitted.cache_clear()


@pytest.mark.parametrize("all_rows", [True, False])
def test_units_cover_every_query_and_page_once(monkeypatch: pytest.MonkeyPatch, all_rows: bool) -> None:
    """Also with a window, and no two splits put a result into the same place."""
    shape, page_size, group, tile, max_splits = PlanShape(24, 6, 12, 8), 16, 3, 16, 4
    monkeypatch.setattr(gpu_units, "ALL_ROWS_SPLIT", 24 if all_rows else 23)
    rng = np.random.default_rng(0)
    make = jax.jit(
        functools.partial(make_units, page_size=page_size, group=group, tile=tile, split_keys=32, max_splits=max_splits)
    )
    for turn in range(40):
        q_len, room = [], 24
        for _ in range(rng.integers(0, 7)):
            q_len.append(int(rng.integers(0, min(room, rng.choice([1, 24])) + 1)))
            room -= q_len[-1]
        kv_len = [n + int(rng.integers(0, 12 * 16 - n + 1)) for n in q_len]
        out = {name: np.full(dims, -1, np.int32) for name, dims in plan_fields(shape).items()}
        fill_plan(shape, out, q_len, kv_len, [[1 + i for i in range(-(-n // 16))] for n in kv_len], page_size)
        plan, window = AttentionPlan(**out), 10_000 if turn % 2 else 40
        units = jax.tree.map(np.asarray, make(plan, window=jnp.int32(window)))
        wanted, found, places, row_splits = set(), [], [], {}
        for seq, first, rows, first_page, pages in out["items"][: out["counts"][1]].tolist():
            position = kv_len[seq] - q_len[seq] + first - int(out["q_start"][seq])
            oldest = max(first_page, max(position - window + 1, 0) // page_size)
            wanted |= {(first * group + q, p) for q in range(rows * group) for p in range(oldest, first_page + pages)}
        assert 0 <= units.num_units[0] <= len(units.units)
        for _, first, rows, _, first_query, begin, end, where in units.units[: units.num_units[0]].tolist():
            queries = range(first_query, min(first_query + tile, rows * group))
            found += [(first * group + q, p) for q in queries for p in range(begin, end)]
            for row in sorted({q // group for q in queries}) if where >= 0 else ():
                row_splits.setdefault(first + row, set()).add(where % max_splits)
                places += [(where + row * max_splits, q % group) for q in queries if q // group == row]
        assert len(found) == len(set(found)) and set(found) == wanted
        assert len(places) == len(set(places))
        assert all(place < partial_slots(plan) * max_splits for place, _ in places)
        merged = {row: set(range(splits)) for row, splits in units.merge.tolist() if splits}
        assert merged == row_splits


def test_rounding_is_to_even() -> None:
    x = np.concatenate([np.arange(-130, 130, 0.25), np.random.default_rng(0).uniform(-127, 127, 1000)])
    x = x.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(round_half_even(jnp.asarray(x))), np.round(x))


def test_copy_pages() -> None:
    pool = np.random.default_rng(0).standard_normal((3, 7, 2, 2, 8, 80)).astype(np.float32)
    pool[:, 0] = np.nan
    expected = pool.copy()
    expected[:, 4], expected[:, 6] = pool[:, 1], pool[:, 2]
    src, dst = jnp.array([1, 2, 3], jnp.int32), jnp.array([4, 6, 5], jnp.int32)
    copied = jax.jit(functools.partial(copy_pages, interpret=True))(pool, src, dst, jnp.int32(2))
    np.testing.assert_array_equal(np.asarray(copied), expected)


def case_of(device: str = "NVIDIA H200", pages: str = "bfloat16", head_dim: int = 128, layout: int = 2) -> Case:
    shapes = {"pages": (4, 9, layout, 8, 64, head_dim), "k_new": (8, 8, head_dim)}
    return Case("gpu", device, shapes, {"pages": pages})


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (case_of(), None),
        (case_of("NVIDIA A100-SXM4-80GB"), None),
        (case_of("NVIDIA A100-SXM4-80GB", "float8_e5m2"), None),
        (case_of("NVIDIA A100-SXM4-80GB", "float8_e4m3fn"), "needs compute capability 8.9 for float8_e4m3fn pages"),
        (case_of("NVIDIA L4", "float8_e4m3fn"), None),
        (case_of("Tesla T4"), "needs compute capability 8.0 for bfloat16 pages, Tesla T4 has 7.5"),
        (case_of("NVIDIA X1000"), None),
        (case_of(pages="uint16"), "uint16 is for the CPU"),
        (case_of(head_dim=512), "up to 256, found 512"),
        (case_of(layout=3), "needs pages of shape"),
    ],
)
def test_dispatch_says_what_a_card_can_run(case: Case, reason: str | None) -> None:
    said = gpu_triton.why_not(case)
    assert said is None if reason is None else reason in (said or "")


def test_lowers_for_a_gpu_without_its_compiler() -> None:
    """Also where the GPU plugin is missing."""
    inputs, mesh = build(CASES["float8_pages_scales"]), AbstractMesh((1,), ("x",), abstract_device=H200)
    with jax.sharding.use_abstract_mesh(mesh):
        call = functools.partial(paged_attention, scale=0.1, implementation="gpu_triton")
        traced = jax.jit(call).trace(
            *(inputs.q, inputs.k_new, inputs.v_new, inputs.pages, inputs.plan), **inputs.arrays
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("gpu.triton") == 2  # block tables this short are not split, so nothing is merged


AHEAD_OF_TIME = Path(__file__).with_name("gpu_programs.py")
PROGRAMS = {
    # name: (tokens, page dtype, head size, page size, query heads, KV heads)
    "decode": (64, "bfloat16", 128, 64, 32, 8),
    "prefill": (2048, "bfloat16", 128, 64, 32, 8),
    "decode_head_64": (64, "bfloat16", 64, 16, 14, 2),
    "prefill_head_80": (512, "bfloat16", 80, 32, 32, 32),
    "prefill_head_256": (512, "bfloat16", 256, 128, 16, 8),
    "decode_float8": (64, "float8_e4m3fn", 128, 64, 64, 8),
    "prefill_int8": (512, "int8", 128, 128, 32, 8),
    "decode_float32": (8, "float32", 128, 64, 32, 8),
}


def compiled(programs: dict, kernel: str, variables: dict[str, str]) -> dict[str, dict[str, int]]:
    """Memory of each program, and of a copy of pages, compiled for an H200 in a process with these variables."""
    done = subprocess.run(
        [sys.executable, str(AHEAD_OF_TIME), json.dumps(programs), kernel],
        env={**os.environ, **environment(TARGETS["sm_90"]), **variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_compiles_for_hopper_in_place_without_spills(tmp_path: Path) -> None:
    """Every kind of program: the pool is aliased, temporaries are small, no register is spilled, shared memory fits."""
    reason = why_not(TARGETS["sm_90"])
    if reason is not None:
        pytest.skip(reason)
    flags = environment(TARGETS["sm_90"])["XLA_FLAGS"] + " " + dump_flags(tmp_path)
    memory = compiled(PROGRAMS, "gpu_triton", {"XLA_FLAGS": flags})
    for name in (*PROGRAMS, "copy", "draw"):
        assert memory[name]["alias"] >= memory[name]["pool"], name
        share = 5 if name == "draw" else 20  # its lists of tokens
        assert memory[name]["temporary"] < memory[name]["pool"] / share, (name, memory[name])
        kernels = read_dump(tmp_path, f"jit_{name}", "paged_attention|write_kv|merge_splits|copy_pages|draw_tokens")
        assert kernels
        for kernel in kernels:
            assert kernel.spill_bytes == 0, kernel
            assert kernel.shared_bytes <= TARGETS["sm_90"].scratch_bytes, kernel
            assert kernel.blocks_per_multiprocessor >= 1, kernel
