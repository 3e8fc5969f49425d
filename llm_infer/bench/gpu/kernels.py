"""Sections of the GPU run: the machine's own rates, and those that attention reaches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.bench.gpu.section import Row, Setting, in_threads, seconds_per_call
from llm_infer.engine.platform import query_rows
from pallas_kernels import dispatch
from pallas_kernels.paged_attention import AttentionPlan, PlanShape, fill_plan, kv_pool_shape, plan_fields
from pallas_kernels.paged_attention.gpu_blocks import Blocks, choose_blocks, tuned_key
from pallas_kernels.paged_attention.gpu_triton import dot_dtype
from pallas_kernels.paged_attention.options import by_keyword

LAYERS = 4
"""Layers of a measured program: each reads its own pages, so the cache does not help."""
MAX_POOL_BYTES = 24e9
GPU_ATTENTION = [row for row in dispatch.IMPLEMENTATIONS["paged_attention"] if row.platforms == ("gpu",)]


@dataclass(frozen=True)
class Shape:
    """A batch of equal sequences: `rows` new tokens each, `context` tokens in all."""

    name: str
    sequences: int
    rows: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    page_dtype: str = "bfloat16"

    @property
    def kv_bytes(self) -> int:
        """The bytes of K and V that a layer has to read once."""
        return (
            self.sequences
            * self.context
            * self.kv_heads
            * self.head_dim
            * 2
            * np.dtype(jnp.dtype(self.page_dtype)).itemsize
        )

    @property
    def flops(self) -> int:
        """The operations of a layer's two products, for visible keys only."""
        pairs = self.rows * (self.context - self.rows) + self.rows * (self.rows + 1) // 2
        return 4 * self.sequences * self.heads * self.head_dim * pairs


DECODE = [
    Shape(f"decode B={b} ctx={n}", b, 1, n) for b, n in ((1, 4096), (1, 32768), (8, 4096), (64, 1024), (64, 4096))
]
DECODE += [Shape("decode B=256 ctx=2048", 256, 1, 2048)]
PREFILL = [Shape("prefill 2048", 1, 2048, 2048), Shape("prefill 4 × 512 at 4096", 4, 512, 4096)]
B64 = Shape("decode B=64 ctx=4096", 64, 1, 4096)
VARIANTS = [
    # 32 sequences: the Triton kernel takes no pool of 8-bit pages between 2 and 4 GiB.
    replace(B64, name="decode B=32 ctx=4096, float8 pages", sequences=32, page_dtype="float8_e4m3fn"),
    replace(B64, name="decode B=32 ctx=4096, int8 pages", sequences=32, page_dtype="int8"),
    replace(B64, name="… page size 16", page_size=16),
    replace(B64, name="… page size 128", page_size=128),
    replace(B64, name="… head size 64", head_dim=64),
    replace(B64, name="… 64 query heads", heads=64),
    replace(B64, name="… draft of 7", rows=8),
    replace(PREFILL[0], name="prefill 2048, head size 64", head_dim=64),
    replace(PREFILL[0], name="prefill 2048, float8 pages", page_dtype="float8_e4m3fn"),
]
SMALL = [Shape("decode B=2 ctx=64", 2, 1, 64, 4, 2, 64, 16), Shape("prefill 16", 1, 16, 32, 4, 2, 64, 16)]


def machine(setting: Setting) -> Iterator[Row]:
    """Measures the roofs: bandwidth of a copy, rate of a bfloat16 matrix product."""
    yield {"what": "copy", "GB/s": _copy_rate(setting)}
    n = 256 if setting.small else 8192
    a = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16))
    seconds = seconds_per_call(lambda: product(a, a))
    yield {"what": f"bfloat16 product of {n}", "TFLOP/s": 2 * n**3 / seconds / 1e12}


@functools.cache
def _copy_rate(setting: Setting) -> float:
    x = jnp.zeros((1 << (14 if setting.small else 28),), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_per_call(lambda: copy(x)) / 1e9


def attention(setting: Setting) -> Iterator[Row]:
    """Measures the time of a layer (writing K and V included), the share of the copy's bandwidth, and the rate of the
    products."""
    shapes = SMALL if setting.small else [*DECODE, *PREFILL, *VARIANTS]
    cases = [(shape, implementation) for shape in shapes for implementation in GPU_ATTENTION]
    programs = list(in_threads(lambda case: _program(setting, *case), cases))
    for (shape, implementation), program in zip(cases, programs, strict=True):
        if setting.seconds_left <= 0:
            return
        row: Row = {"shape": shape.name, "implementation": implementation.name}
        if isinstance(program, Exception):
            yield row | {"ok": False, "note": _short(program)}
        elif isinstance(program, str):
            yield row | {"note": program}
        else:
            yield _row(setting, shape, implementation.name, measure(setting, make_arguments(shape), program))


Program = jax.stages.Compiled | Exception


def _program(setting: Setting, shape: Shape, implementation: dispatch.Implementation) -> Program | str:
    """Returns the program, or why the implementation does not take the case."""
    arguments = abstract_arguments(shape)
    reason = implementation.why_not(_case(setting, arguments))
    return reason or _compiled_or_error(setting, arguments, implementation.name)


def _compiled_or_error(setting: Setting, arguments: Sequence[Any], name: str, **options: Any) -> Program:
    """Returns the program, or the error of a compiler that refuses it, so that the others are measured all the same."""
    try:
        return compile_layers(setting, arguments, name, **options)
    except Exception as error:
        return error


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _row(setting: Setting, shape: Shape, name: str, seconds: float) -> Row:
    rate = shape.kv_bytes / seconds / 1e9
    return {
        "shape": shape.name,
        "implementation": name,
        "µs": 1e6 * seconds,
        "KV MB": shape.kv_bytes / 1e6,
        "GB/s": rate,
        "of copy": rate / _copy_rate(setting),
        "TFLOP/s": shape.flops / seconds / 1e12,
    }


def abstract_arguments(shape: Shape) -> tuple[Any, ...]:
    """Returns (pages, q, k, v, plan, scales) of a program, as shapes and dtypes."""
    array, dtype, tokens = jax.ShapeDtypeStruct, jnp.dtype(shape.page_dtype), shape.sequences * shape.rows
    per_sequence = -(-shape.context // shape.page_size)
    pool_shape = kv_pool_shape(
        "gpu",
        num_layers=max(1, min(LAYERS, int(MAX_POOL_BYTES // shape.kv_bytes))),
        num_pages=shape.sequences * per_sequence + 1,
        page_size=shape.page_size,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
    )
    q, kv = (array((tokens, heads, shape.head_dim), jnp.bfloat16) for heads in (shape.heads, shape.kv_heads))
    fields = plan_fields(_plan_shape(shape))
    plan = AttentionPlan(**{name: array(dims, jnp.int32) for name, dims in fields.items()})
    names = ("k_scale", "v_scale") if dtype.itemsize == 1 else ()
    return array(pool_shape, dtype), q, kv, kv, plan, {name: array((), jnp.float32) for name in names}


def make_arguments(shape: Shape) -> tuple[Any, ...]:
    """Returns the same as arrays: random q, k and v; a sequence's pages lie scattered in a pool of ones."""
    pages, *inputs, _, scales = abstract_arguments(shape)
    out = {name: np.zeros(dims, np.int32) for name, dims in plan_fields(_plan_shape(shape)).items()}
    tables = 1 + np.random.default_rng(0).permutation(pages.shape[1] - 1).reshape(shape.sequences, -1)
    new, context = ([rows] * shape.sequences for rows in (shape.rows, shape.context))
    fill_plan(_plan_shape(shape), out, new, context, tables.astype(np.int32), shape.page_size)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, inputs, strict=True))
    plan = jax.tree.map(jnp.asarray, AttentionPlan(**out))
    return jnp.ones(pages.shape, pages.dtype), q, k, v, plan, dict.fromkeys(scales, jnp.float32(0.05))


def _plan_shape(shape: Shape) -> PlanShape:
    tokens, group = shape.sequences * shape.rows, shape.heads // shape.kv_heads
    return PlanShape(
        tokens, shape.sequences, -(-shape.context // shape.page_size), min(tokens, query_rows("gpu", group))
    )


def compile_layers(setting: Setting, arguments: Sequence[Any], name: str, **options: Any) -> jax.stages.Compiled:
    """Compiles a program of several layers, whose outputs feed the next, for arguments as shapes and dtypes."""
    function = by_keyword(dispatch.implementation("paged_attention", name))
    if setting.interpret:
        options["interpret"] = True

    def layers(pages, q, k, v, plan, scales):
        for layer in range(pages.shape[0]):
            q, pages = function(q, k, v, pages, plan, layer=jnp.int32(layer), scale=0.088, **scales, **options)
        return q, pages

    return jax.jit(layers, donate_argnums=0).lower(*arguments).compile()


def measure(setting: Setting, arguments: Sequence[Any], program: jax.stages.Compiled) -> float:
    """Returns the seconds of one layer of a program of `compile_layers`."""
    call = layers_call(arguments, program)
    return seconds_per_call(call, rounds=1 if setting.small else 5) / arguments[0].shape[0]


def layers_call(arguments: Sequence[Any], program: jax.stages.Compiled) -> Callable[[], jax.Array]:
    """Returns a function that runs a program of `compile_layers` on the pages that the call before left, and its output."""
    pages, *others = arguments
    held = [pages]

    def call() -> jax.Array:
        out, held[0] = program(held[0], *others)
        return out

    return call


def _case(setting: Setting, arguments: Sequence[Any]) -> dispatch.Case:
    pages, q, k, v, plan, scales = arguments
    arrays = {"pages": pages, "q": q, "k_new": k, "v_new": v, **plan._asdict()}
    return dispatch.Case(
        "gpu",
        "NVIDIA H200" if setting.interpret else jax.devices()[0].device_kind,
        {name: tuple(array.shape) for name, array in arrays.items()},
        {name: array.dtype.name for name, array in arrays.items()},
        {"q_block": plan.q_block, "window": None, "softcap": None, "sinks": False, "kv_scales": bool(scales)},
    )


def block_sizes(setting: Setting) -> Iterator[Row]:
    """Measures the Triton kernel with other block sizes than the heuristic's, which `pallas_kernels/tuned` could hold."""
    changes: list[dict[str, int]] = [
        {},
        {"tile": 16},
        {"tile": 32},
        {"keys": 32},
        {"keys": 128, "stages": 2},
        {"stages": 2},
        {"stages": 4},
        {"warps": 8},
        {"split_keys": 512},
        {"split_keys": 1024},
        {"programs": 33},
    ]
    shapes = SMALL[:1] if setting.small else [DECODE[0], B64, *VARIANTS[:2], PREFILL[0]]
    cases = [(shape, change) for shape in shapes for change in (changes[3:4] if setting.small else changes)]
    programs = list(in_threads(lambda case: _compiled_with(setting, *case), cases))
    for (shape, change), (blocks, program) in zip(cases, programs, strict=True):
        if setting.seconds_left <= 0:
            return
        key = tuned_key(shape.page_dtype, shape.head_dim, shape.sequences * shape.rows)
        row = {"shape": shape.name, "key": key, "change": str(change)}
        if isinstance(program, Exception):  # that the compiler refuses a size is a finding, not a failure
            yield row | {"µs": None, "note": _short(program)}
            continue
        seconds = measure(setting, make_arguments(shape), program)
        yield row | {"µs": 1e6 * seconds, "GB/s": shape.kv_bytes / seconds / 1e9, **asdict(blocks)}


def _compiled_with(setting: Setting, shape: Shape, change: dict[str, int]) -> tuple[Blocks, Program]:
    """Returns the block sizes and the program, or the compiler's error."""
    arguments = abstract_arguments(shape)
    pages, q, plan = arguments[0], arguments[1], arguments[4]
    sizes = dict(
        num_kv_heads=shape.kv_heads,
        group=shape.heads // shape.kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        item_bytes=dot_dtype(q.dtype, pages.dtype).itemsize,
    )
    blocks = replace(choose_blocks(plan, jax.devices()[0].device_kind, shape.page_dtype, **sizes), **change)
    return blocks, _compiled_or_error(setting, arguments, "gpu_triton", blocks=blocks)
