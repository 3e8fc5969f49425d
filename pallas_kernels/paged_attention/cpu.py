"""Native CPU paged attention and page copies, called through XLA's FFI (see `pallas_kernels.cpu_ffi`)."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_ffi
from pallas_kernels.dispatch import Case
from pallas_kernels.paged_attention.options import AttentionOptions
from pallas_kernels.paged_attention.page_width import page_width
from pallas_kernels.paged_attention.pages import why_not_plain
from pallas_kernels.paged_attention.plan import AttentionPlan

PAGE_DTYPES = ("float32", "bfloat16", "uint16", "float16", "int8", "uint8")
MAX_SLOTS = 2048  # partial results of shared splits; each is (D + 2) G float32
_SOURCES = tuple(str(Path(__file__).parent / name) for name in ("cpu_kernel.py", "cpu_softmax.py", "page_width.py"))
EVERYTHING = 2**30  # a window that hides nothing


def why_not(case: Case) -> str | None:
    """Refuses a process without native kernels, and other pages than those of the plain layout with 16 … 256 tokens each."""
    if reason := cpu_ffi.why_not():
        return reason
    if "src" in case.shapes:  # copy_pages: any layout, any dtype
        return None
    num_kv_heads, head_dim = case.shapes["k_new"][1:]
    if reason := why_not_plain(case.shapes["pages"], num_kv_heads, head_dim, case.dtypes["pages"]):
        return reason
    if case.dtypes["pages"] not in PAGE_DTYPES:
        return f"needs pages of {', '.join(PAGE_DTYPES)}, found {case.dtypes['pages']}"
    if head_dim % 2:
        return f"needs an even head size, found {head_dim}"
    page_size = case.shapes["pages"][4]
    if page_size % 16 or page_size > 256:
        return f"needs pages of 16, 32, 48 … 256 tokens, found {page_size}"
    return None


def paged_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    pages: jax.Array,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array]:
    """Attends natively, see `pallas_kernels.paged_attention.paged_attention`. Padding rows give 0."""
    layer, scale, window, softcap, sinks, k_scale, v_scale = options
    num_heads, num_kv_heads, head_dim = q.shape[1], k_new.shape[1], q.shape[2]
    scaled = k_scale is not None or v_scale is not None
    kernel = attention_kernel(head_dim, pages.dtype.name, softcap is not None, sinks is not None, scaled)
    f32 = jnp.float32
    scalars = [
        jnp.asarray(layer, jnp.int32),
        jnp.asarray(EVERYTHING if window is None else window, jnp.int32),
        *(jnp.asarray(1.0 if x is None else x, f32) for x in (scale, softcap, k_scale, v_scale)),
    ]
    extra = [] if sinks is None else [sinks.astype(f32)]
    item_slots = plan.items.shape[0] * num_kv_heads
    splits = -(-plan.block_tables.shape[1] * pages.shape[4] // 256)
    dims = {"slots": min(MAX_SLOTS, item_slots * splits), "width": num_heads // num_kv_heads * (head_dim + 2)}
    rows = (x.astype(f32) for x in (q, k_new, v_new))
    out, pages, _ = kernel(*rows, pages, *plan, *scalars, *extra, dims=dims)
    return out.astype(q.dtype), pages


@cache
def attention_kernel(head_dim: int, page_dtype: str, softcap: bool, sinks: bool, scales: bool) -> Any:
    """Makes the kernel for one set of static properties."""
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.paged_attention import cpu_kernel, cpu_softmax

    variant = cpu_softmax.Variant(head_dim, page_dtype, softcap, sinks, scales)
    pool = Buffer(page_dtype, f"L P 2 Hkv C {page_width(head_dim, page_dtype)}")
    rows, kv_rows = Buffer("float32", f"T Hq {head_dim}"), Buffer("float32", f"T Hkv {head_dim}")
    scalar_names = ("scale", "softcap", "k_scale", "v_scale")
    plan_dims = {
        "block_tables": "S B", "q_start": "S1", "kv_len": "S", "write_slot": "T", "items": "N 5", "counts": "2",
    }  # fmt: skip
    return Kernel(
        name=variant.name,
        args={
            "q": rows,
            "k_new": kv_rows,
            "v_new": kv_rows,
            "pages": pool,
            **{name: Buffer("int32", plan_dims[name]) for name in AttentionPlan._fields},
            **{name: Buffer("int32", "") for name in ("layer", "window")},
            **{name: Buffer("float32", "") for name in scalar_names},
            **({"sinks": Buffer("float32", "Hq")} if sinks else {}),
        },
        results={"out": rows, "pages_out": pool, "partial": Buffer("float32", "slots width")},
        aliases={"pages": "pages_out"},
        body=partial(cpu_kernel.body, variant=variant),
        sources=_SOURCES,
    )


def copy_pages(pages: jax.Array, src: jax.Array, dst: jax.Array, count: jax.Array) -> jax.Array:
    """Copies natively, see `pallas_kernels.paged_attention.copy_pages`."""
    kernel = copy_kernel(pages.dtype.name, pages.ndim, pages.dtype.itemsize)
    return kernel(pages, src, dst, count)[0]


@cache
def copy_kernel(dtype: str, rank: int, itemsize: int) -> Any:
    """Makes the kernel that copies pages of a pool [L, P, ...] of one dtype and rank."""
    from pallas_kernels.cpu_ffi.bridge import Kernel
    from pallas_kernels.cpu_ffi.call_frame import Buffer
    from pallas_kernels.paged_attention import cpu_kernel

    pool = Buffer(dtype, " ".join(["L", "P", *(f"X{i}" for i in range(rank - 2))]))
    return Kernel(
        name=f"copy_pages_{dtype}_{rank}",
        args={"pages": pool, "src": Buffer("int32", "N"), "dst": Buffer("int32", "N"), "count": Buffer("int32", "")},
        results={"pages_out": pool},
        aliases={"pages": "pages_out"},
        body=partial(cpu_kernel.copy_pages_body, inner=[f"X{i}" for i in range(rank - 2)], itemsize=itemsize),
        sources=_SOURCES,
    )
