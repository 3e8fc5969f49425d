"""The layouts of the KV pool and the cast of K and V to and from its dtype.

Every layout has layers on axis 0, pages on axis 1 and heads on axis 3; what follows belongs to the backend, and nothing
outside `pallas_kernels` indexes into it. There are two:

- plain [L, P, 2, Hkv, C, D], on CPU and GPU: K before V, and the C tokens of one head of a page lie together, so that a
  page's K of a head is one [C, D] block. Pages of int8 on the CPU are uint8 [L, P, 2, Hkv, C, D + 4]: behind the numbers of a
  token and head lie the bytes of a float32 by which they are to be multiplied.
- tpu [L, P, C, W, K, Dp]: tokens are outermost and outside the tiled axes, so that a DMA can move any run of tokens and
  write one without reading its neighbours. K = 4 bytes / item size numbers share a 32-bit word of a lane, W words make a
  token, and Dp is D rounded up to 128 lanes. Entry i of a token is number i % K of word i // K. With D > 64 entries 2h
  and 2h + 1 are K and V of head h; with D <= 64 entry h holds both, K from lane 0 and V from lane 64. The rest
  is 0 or, in pages that nobody has written, anything.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from pallas_kernels.dispatch import Case
from pallas_kernels.paged_attention.page_width import SCALE_BYTES, SMALLEST_SCALE, page_width

LANES = 128
HALF_LANES = LANES // 2  # heads up to this size have K and V side by side on the lanes of the TPU layout

KV_HEADS_AXIS = 3
"""The axis along which the pools of devices that have different KV heads of the same pages lie side by side."""

# uint16 holds the bits of bfloat16 numbers, uint8 int8 numbers with scales of their own, see kv_pool_dtype.
POOL_DTYPES = ("float32", "bfloat16", "uint16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
CPU_DTYPES = ("uint16", "uint8")


def kv_pool_shape(
    platform: str, *, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> tuple[int, ...]:
    """Returns the shape of the KV pool on a platform, page 0 (the null page) included.

    Args:
        platform: cpu or gpu (plain layout), or tpu.
        num_layers: L.
        num_pages: P; at least 2, for page 0 never holds a sequence's tokens.
        page_size: C, tokens per page.
        num_kv_heads: Hkv of one shard.
        head_dim: D.
        dtype: type of the pages, one of POOL_DTYPES (allocate with `kv_pool_dtype`).

    Raises:
        ValueError: the platform or dtype is unknown, or a size is under its minimum.
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
    if platform == "tpu":
        return (num_layers, num_pages, page_size, *token_shape(num_kv_heads, head_dim, np.dtype(dtype).itemsize))
    width = page_width(head_dim, kv_pool_dtype(platform, dtype).name)
    return (num_layers, num_pages, 2, num_kv_heads, page_size, width)


def token_shape(num_kv_heads: int, head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """Returns (W, K, Dp) of one token in the TPU layout, for numbers of `itemsize` bytes."""
    packing = 4 // itemsize
    entries = num_kv_heads if head_dim <= HALF_LANES else 2 * num_kv_heads
    return -(-entries // packing), packing, -(-head_dim // LANES) * LANES


def kv_pool_dtype(platform: str, dtype: Any) -> np.dtype:
    """Returns the dtype with which to allocate the pool, for pages of `dtype` on a platform.

    It is `dtype` itself, but on the CPU an array of uint16 holds the bits of bfloat16 pages, and one of uint8 int8 pages, whose
    tokens and heads have a scale each. XLA on the CPU widens a whole bfloat16 array to float32 for each update of a few of
    its rows (seen on jax 0.10.2), while it leaves integers alone.
    """
    stored = {"bfloat16": np.uint16, "int8": np.uint8} if platform == "cpu" else {}
    return np.dtype(stored.get(np.dtype(dtype).name, dtype))


def is_tpu_layout(shape: tuple[int, ...], num_kv_heads: int, head_dim: int, itemsize: int) -> bool:
    """Checks whether `shape` is a pool of the TPU layout for these heads."""
    return len(shape) == 6 and shape[3:] == token_shape(num_kv_heads, head_dim, itemsize)


def turn_keys(pages: np.ndarray, back: bool = False) -> np.ndarray:
    """Returns a copy of a pool of the plain layout as native CPU kernels store it; `back` undoes that.

    Every K block [C, D] is stored as [D, C]. The scales of a block of uint8 come behind all of its numbers.
    """
    page_size, head_dim = pages.shape[4:]
    if pages.dtype == np.uint8:
        head_dim -= SCALE_BYTES
        flat, size = pages.reshape(*pages.shape[:4], -1), page_size * head_dim
        if back:
            numbers = flat[..., :size].reshape(*pages.shape[:4], page_size, head_dim)
            numbers = turn_keys(numbers.view(np.int8), back=True).view(np.uint8)
            return np.concatenate([numbers, flat[..., size:].reshape(*pages.shape[:5], SCALE_BYTES)], axis=-1)
        numbers, scales = turn_keys(pages[..., :head_dim].view(np.int8)).view(np.uint8), pages[..., head_dim:]
        parts = [part.reshape(*pages.shape[:4], -1) for part in (numbers, scales)]
        return np.concatenate(parts, axis=-1).reshape(pages.shape)
    turned, keys = pages.copy(), pages[:, :, 0]
    shape = (*keys.shape[:-2], head_dim, page_size) if back else keys.shape
    turned[:, :, 0] = rearrange(keys.reshape(shape), "l p h a b -> l p h b a").reshape(keys.shape)
    return turned


def why_not_plain(shape: tuple[int, ...], num_kv_heads: int, head_dim: int, dtype: str) -> str | None:
    """Says why `shape` is no pool of the plain layout for these heads and a dtype of the pool; None where it is."""
    if len(shape) == 6 and shape[2:4] == (2, num_kv_heads) and shape[5] == page_width(head_dim, dtype):
        return None
    return f"needs pages of shape {_plain_shape(num_kv_heads, head_dim, dtype)}, found {list(shape)}"


def _plain_shape(num_kv_heads: int, head_dim: int, dtype: str) -> str:
    scale = f" + {SCALE_BYTES}" if dtype == "uint8" else ""
    return f"[L, P, 2, Hkv={num_kv_heads}, C, D={head_dim}{scale}]"


def why_not_any_layout(case: Case) -> str | None:
    """Says why the case's pool has neither of the two layouts; None where it has one."""
    shape, (num_kv_heads, head_dim) = case.shapes["pages"], case.shapes["k_new"][1:]
    dtype = case.dtypes["pages"]
    itemsize = itemsize_of(dtype)
    if is_tpu_layout(shape, num_kv_heads, head_dim, itemsize) and dtype != "uint8":
        return None
    if why_not_plain(shape, num_kv_heads, head_dim, dtype) is None:
        return None
    words, packing, lanes = token_shape(num_kv_heads, head_dim, itemsize)
    return (
        f"needs pages of shape {_plain_shape(num_kv_heads, head_dim, dtype)} or, for TPU, "
        f"[L, P, C, {words}, {packing}, {lanes}], found {list(shape)}"
    )


def itemsize_of(dtype_name: str) -> int:
    """Returns the bytes of a number of one of POOL_DTYPES, by name."""
    return {"float32": 4, "bfloat16": 2, "uint16": 2, "float16": 2}.get(dtype_name, 1)


def pack_tokens(k: Any, v: Any) -> Any:
    """Packs K and V [..., Hkv, D] of tokens, in the page dtype, as the TPU layout stores them: [..., W, K, Dp].

    It takes and returns numpy or JAX arrays.
    """
    xp = np if isinstance(k, np.ndarray) else jnp
    *lead, num_kv_heads, head_dim = k.shape
    words, packing, lanes = token_shape(num_kv_heads, head_dim, k.dtype.itemsize)
    half = HALF_LANES if head_dim <= HALF_LANES else lanes
    no_pad = [(0, 0)] * (len(lead) + 1)
    k, v = (xp.pad(x, (*no_pad, (0, half - head_dim))) for x in (k, v))
    if head_dim <= HALF_LANES:
        entries = xp.concatenate([k, v], axis=-1)
    else:
        entries = rearrange(xp.stack([k, v], axis=-2), "... h two d -> ... (h two) d")
    left_over = words * packing - entries.shape[-2]
    entries = xp.pad(entries, (*no_pad[1:], (0, left_over), (0, 0)))
    return rearrange(entries, "... (w p) d -> ... w p d", p=packing)


def unpack_tokens(stored: Any, num_kv_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Returns K and V [..., Hkv, D] of packed tokens, the inverse of `pack_tokens`."""
    entries = rearrange(stored, "... w p d -> ... (w p) d")
    if head_dim <= HALF_LANES:
        entries = entries[..., :num_kv_heads, :]
        return entries[..., :head_dim], entries[..., HALF_LANES : HALF_LANES + head_dim]
    entries = rearrange(entries[..., : 2 * num_kv_heads, :], "... (h two) d -> ... h two d", two=2)
    return entries[..., 0, :head_dim], entries[..., 1, :head_dim]


def plain_to_tpu(pages: np.ndarray) -> np.ndarray:
    """Converts a plain pool [L, P, 2, Hkv, C, D] (or any pages [..., 2, Hkv, C, D]) to the TPU layout."""
    k, v = rearrange(pages, "... two h c d -> two ... c h d")
    return pack_tokens(k, v)


def tpu_to_plain(pages: Any, num_kv_heads: int, head_dim: int) -> Any:
    """Converts pages [..., C, W, K, Dp] of the TPU layout to the plain one: [..., 2, Hkv, C, D]."""
    k, v = unpack_tokens(pages, num_kv_heads, head_dim)
    return rearrange([k, v], "two ... c h d -> ... two h c d")


def to_page_dtype(x: jax.Array, scale: jax.Array | float | None, dtype: Any) -> jax.Array:
    """Returns x / scale as it is stored in pages: rounded and clipped to ±127 for int8, clipped (not NaN) for float8.

    For uint8 the last axis is longer by the bytes of a scale: the largest of its numbers is stored as ±127.
    """
    x = x.astype(jnp.float32)
    if np.dtype(dtype) == np.uint8:
        own = jnp.max(jnp.abs(x), axis=-1, keepdims=True) * jnp.float32(1 / 127)
        inverse = jnp.where(own >= SMALLEST_SCALE, 1.0 / own, 0.0)
        numbers = jnp.clip(jnp.round(x * inverse), -127.0, 127.0).astype(jnp.int8)
        both = lax.bitcast_convert_type(numbers, jnp.uint8), lax.bitcast_convert_type(own[..., 0], jnp.uint8)
        return jnp.concatenate(both, axis=-1)
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
    """Returns what is stored in pages, in float32, before the multiplication by a scale that is not stored with it."""
    if stored.dtype == jnp.uint8:
        numbers = lax.bitcast_convert_type(stored[..., :-SCALE_BYTES], jnp.int8).astype(jnp.float32)
        return numbers * lax.bitcast_convert_type(stored[..., -SCALE_BYTES:], jnp.float32)[..., None]
    if stored.dtype == jnp.uint16:
        stored = lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored.astype(jnp.float32)
