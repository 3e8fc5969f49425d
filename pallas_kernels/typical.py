"""Cases that serving meets on a chip, as `dispatch.Case`s: for showing, and testing, what is chosen there. No arrays are made."""

from __future__ import annotations

from pallas_kernels.dispatch import Case
from pallas_kernels.paged_attention.pages import kv_pool_dtype, kv_pool_shape
from pallas_kernels.paged_attention.plan import PlanShape, plan_fields

PAGE_DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "gpu": ("bfloat16", "float8_e4m3fn", "int8")}
PAGE_DTYPES["tpu"] = PAGE_DTYPES["gpu"]


def typical_cases(platform: str, device_kind: str) -> list[tuple[str, str, Case]]:
    """Returns (op, what is special about it, case) for a platform (cpu, gpu or tpu) and device.

    Attention: Llama-3.1-8B's heads, 64 tokens per step. Experts: Qwen3-30B-A3B. Weights: a matrix of 4096 × 4096.
    Logits: Llama 3's. Convolutions: LFM2-1.2B.
    """
    found: list[tuple[str, str, Case]] = []
    dtype = "float32" if platform == "cpu" else "bfloat16"
    for head_dim in (64, 128, 256):
        for page_dtype in PAGE_DTYPES[platform] if head_dim == 128 else PAGE_DTYPES[platform][:1]:
            label = f"heads of {head_dim}, {page_dtype} pages"
            found.append(("paged_attention", label, attention(platform, device_kind, head_dim, page_dtype, dtype)))
    pages = attention(platform, device_kind, 128, PAGE_DTYPES[platform][0], dtype)
    shapes = {"pages": pages.shapes["pages"], "src": (8,), "dst": (8,)}
    copied = Case(platform, device_kind, shapes, {"pages": pages.dtypes["pages"], "src": "int32", "dst": "int32"})
    found.append(("copy_pages", "8 pages", copied))
    for kind, items in (("q4_k", 2304), ("q8_0", 4352)):
        for rows in (1, 512):
            case = Case(
                platform,
                device_kind,
                {"x": (rows, 4096), "blocks": (32, 4096, items)},
                {"x": "float32", "blocks": "uint8"},
                {"kind": kind, "precision": "exact", "tiled": False},
            )
            found.append(("quant_matmul", f"{kind}, {rows} row{'s' if rows > 1 else ''}", case))
    experts = {"x": (512, 2048), "weights": (48, 128 * 768, 2048), "group_sizes": (128,)}
    dtypes = {"x": dtype, "weights": dtype, "group_sizes": "int32"}
    found.append(("grouped_matmul", "128 experts", Case(platform, device_kind, experts, dtypes)))
    for label, dtype_of_weights, width, groups in (
        ("int8, a scale per feature", "int8", 4096, 1),
        ("int4, groups of 128", "uint8", 2048, 32),
    ):
        shapes = {"x": (64, 4096), "weights": (32, 4096, width), "scales": (32, 4096, groups)}
        dtypes = {"x": dtype, "weights": dtype_of_weights, "scales": "float32"}
        found.append(("scaled_matmul", label, Case(platform, device_kind, shapes, dtypes)))
    logits = Case(platform, device_kind, {"logits": (64, 128256)}, {"logits": "float32"})
    norm = Case(platform, device_kind, {"x": (64, 4096)}, {"x": "float32"}, {"kind": "squares"})
    rows = {"q_start": (65,), "state_from": (64,), "state_to": (64,), "state_count": (64,)}
    shapes = {"x": (64, 2048), "taps": (2048, 3), "states": (10, 1024, 2, 2048)}
    convolved = Case(
        platform, device_kind, {**shapes, **rows}, dict.fromkeys(shapes, dtype) | dict.fromkeys(rows, "int32")
    )
    found.append(("causal_conv", "LFM2-1.2B, 64 rows", convolved))
    return [*found, ("draw_tokens", "64 rows", logits), ("row_sums", "a norm of 64 rows", norm)]


def attention(platform: str, device_kind: str, head_dim: int, page_dtype: str, dtype: str) -> Case:
    """Returns a step of 64 tokens with 32 query heads over 8 KV heads, pages of 64 tokens."""
    pool = kv_pool_shape(
        platform, num_layers=32, num_pages=1024, page_size=64, num_kv_heads=8, head_dim=head_dim, dtype=page_dtype
    )
    plan, stored = plan_fields(PlanShape(64, 64, 128, 32)), kv_pool_dtype(platform, page_dtype).name
    kv = (64, 8, head_dim)
    return Case(
        platform,
        device_kind,
        {"q": (64, 32, head_dim), "k_new": kv, "v_new": kv, "pages": pool, **plan},
        {
            **dict.fromkeys(("q", "k_new", "v_new"), dtype),
            "pages": stored,
            **dict.fromkeys(plan, "int32"),
        },
        {"q_block": 32, "window": None, "softcap": None, "sinks": False, "kv_scales": stored not in (dtype, "uint8")},
    )
