"""The layout of the KV pool and the cast of K and V to and from its dtype.

Every layout has layers on axis 0 and pages on axis 1; what follows belongs to the backend, and nothing outside
`pallas_kernels` indexes into it. There is one layout so far, the plain one: [L, P, 2, Hkv, C, D], K before V, where the
C tokens of one head of a page lie together, so that a page's K of a head is one [C, D] block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# uint16 holds the bits of bfloat16 numbers, see kv_pool_dtype.
POOL_DTYPES = ("float32", "bfloat16", "uint16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


def kv_pool_shape(
    platform: str, *, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> tuple[int, ...]:
    """Shape of the KV pool on a platform, page 0 (the null page) included.

    Args:
        platform: cpu, gpu or tpu. All three have the plain layout [L, P, 2, Hkv, C, D].
        num_layers: L.
        num_pages: P; at least 2, for page 0 never holds a sequence's tokens.
        page_size: C, tokens per page.
        num_kv_heads: Hkv of one shard.
        head_dim: D.
        dtype: of the pages, one of POOL_DTYPES (allocate with `kv_pool_dtype`).

    Raises:
        ValueError: an unknown platform or dtype, or a size under its minimum.
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"platform is {platform!r}, expected cpu, gpu or tpu")
    if np.dtype(dtype).name not in POOL_DTYPES:
        raise ValueError(f"dtype of the pages is {np.dtype(dtype).name}, expected one of {', '.join(POOL_DTYPES)}")
    sizes = dict(num_layers=num_layers, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")
    if num_pages < 2:
        raise ValueError(f"num_pages is {num_pages}, expected at least 2 (page 0 is the null page)")
    return (num_layers, num_pages, 2, num_kv_heads, page_size, head_dim)


def kv_pool_dtype(platform: str, dtype: Any) -> np.dtype:
    """Dtype to allocate the pool with, for pages of `dtype` on a platform.

    It is `dtype` itself, but for bfloat16 on the CPU: there the pool is an array of uint16 that holds the same bits.
    XLA on the CPU widens a whole bfloat16 array to float32 for each update of a few of its rows (seen on jax 0.10.2),
    while it leaves integers alone.
    """
    return np.dtype(np.uint16) if platform == "cpu" and np.dtype(dtype).name == "bfloat16" else np.dtype(dtype)


def why_not_plain(shape: tuple[int, ...], num_kv_heads: int, head_dim: int) -> str | None:
    """None where `shape` is a pool of the plain layout for these heads, else what is wrong with it."""
    if len(shape) == 6 and shape[2:4] == (2, num_kv_heads) and shape[5] == head_dim:
        return None
    return f"needs pages of shape [L, P, 2, Hkv={num_kv_heads}, C, D={head_dim}], found {list(shape)}"


def to_page_dtype(x: jax.Array, scale: jax.Array | float | None, dtype: Any) -> jax.Array:
    """x / scale as it is stored in pages: rounded and clipped to ±127 for int8, clipped (not NaN) for float8."""
    x = x.astype(jnp.float32)
    if scale is not None:
        x = x / jnp.asarray(scale, jnp.float32)
    if np.dtype(dtype) == np.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    if np.dtype(dtype) == np.int8:
        return jnp.clip(jnp.round(x), -127.0, 127.0).astype(dtype)
    if np.dtype(dtype).itemsize == 1:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def from_page_dtype(stored: jax.Array) -> jax.Array:
    """What is stored in pages, in float32, before the multiplication by the scale."""
    if stored.dtype == jnp.uint16:
        stored = lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored.astype(jnp.float32)
