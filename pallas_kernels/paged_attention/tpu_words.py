"""Views of VMEM that the TPU kernel needs and the interpreter lacks, each beside the twin that replaces it there.

The TPU keeps numbers under 32 bits packed in words along the second-last axis. Reading a head's K out of tokens that lie
[W words, K numbers] is a load of every W-th word and a shift; folding [rows, G] into rows moves nothing if they are seen as
words.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.pages import HALF_LANES, LANES, pack_tokens, token_shape


def number_of_word(word: jax.Array, index: int, dtype: Any) -> jax.Array:
    """Returns number `index` of the packed numbers of each 32-bit word, lowest bits first: uint32 [...] → float32 [...].

    Exact for bfloat16 and int8; for others see `_converted`.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:
        bits = word << jnp.uint32(16) if index == 0 else word & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    if dtype == jnp.int8:
        signed = jax.lax.bitcast_convert_type(word, jnp.int32) << jnp.int32(24 - 8 * index)
        return (signed >> jnp.int32(24)).astype(jnp.float32)
    raise ValueError(f"expected words of bfloat16 or int8, found {dtype.name}")


def load_entry(tokens: Any, entry: Any, page_dtype: Any, compute_dtype: Any, interpret: bool) -> jax.Array:
    """Loads one entry of all tokens in VMEM: [N, Dp] in the compute dtype.

    Args:
        tokens: reference to words [N, W, 1, Dp] (float32 itself, else uint32); in the interpreter to numbers [N, W, K, Dp].
        entry: (word, number): the word of a token (may be traced) and the number in the word (static).
        page_dtype: type of the numbers.
        compute_dtype: bfloat16 or float32.
        interpret: whether to take the twin.
    """
    (count, words, _, lanes), (word, number) = tokens.shape, entry
    if interpret:
        return tokens[:, word, number, :].astype(compute_dtype)
    tiles = lanes // LANES
    flat = tokens.reshape(count * words * tiles, LANES)
    parts = []
    for tile in range(tiles):
        start, stride = word * tiles + tile, words * tiles
        loaded = flat[pl.ds(start, count, stride), :] if stride > 1 else flat[...]
        parts.append(_converted(loaded, number, page_dtype, compute_dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def as_words(ref: Any, interpret: bool) -> Any:
    """Returns a reference [..., K, Dp] to numbers as one to words [..., 1, Dp]; in the interpreter, as it is."""
    return ref if interpret or ref.dtype.itemsize == 4 else ref.bitcast(jnp.uint32)


def pack_words(k: jax.Array, v: jax.Array) -> jax.Array:
    """Packs K and V [T, Hkv, D] in the page dtype as words of the TPU layout, [T, W, 1, Dp], in arithmetic that XLA fuses.

    The words are those of `pages.pack_tokens`; packing numbers along the second-last axis costs XLA several copies.
    """
    tokens, num_kv_heads, head_dim = k.shape
    words, packing, lanes = token_shape(num_kv_heads, head_dim, k.dtype.itemsize)
    if packing == 1:
        return pack_tokens(k, v)
    bits = jnp.uint16 if packing == 2 else jnp.uint8
    k, v = (jax.lax.bitcast_convert_type(x, bits) for x in (k, v))
    half = HALF_LANES if head_dim <= HALF_LANES else lanes
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, half - head_dim))) for x in (k, v))
    entries = [jnp.concatenate([k, v], axis=2)] if head_dim <= HALF_LANES else [k, v]
    heads = packing // len(entries)  # heads that share a word
    filled = [jnp.pad(x, ((0, 0), (0, words * heads - num_kv_heads), (0, 0))) for x in entries]
    word = jnp.zeros((tokens, words, lanes), jnp.uint32)
    for number in range(packing):
        part = filled[number % len(entries)][:, number // len(entries) :: heads]
        word |= part.astype(jnp.uint32) << jnp.uint32(number * 8 * jnp.dtype(bits).itemsize)
    return word[:, :, None, :]


def _converted(loaded: jax.Array, number: int, dtype: Any, compute_dtype: Any) -> jax.Array:
    """Returns loaded 32-bit items as numbers: float32 itself, else one of the numbers packed in a word."""
    if jnp.dtype(dtype).itemsize == 4:
        return loaded.astype(compute_dtype)
    if jnp.dtype(dtype) in (jnp.bfloat16, jnp.int8):
        return number_of_word(loaded, number, dtype).astype(compute_dtype)
    byte = (loaded >> jnp.uint32(8 * number)).astype(jnp.uint8)  # float8: let the compiler convert
    return pltpu.bitcast(byte, dtype).astype(jnp.float32).astype(compute_dtype)


def load_rows(ref: Any, lanes: int, interpret: bool) -> jax.Array:
    """Loads [rows, G, D] as a value [rows * G, lanes], 0 past D; G is a multiple of the numbers in a word."""
    rows, group, head_dim = ref.shape
    if interpret:
        value = ref[...].reshape(rows * group, head_dim)
    else:
        value = _words_of_rows(ref)[...]
        value = pltpu.bitcast(value, ref.dtype) if ref.dtype.itemsize < 4 else value
    if head_dim == lanes:
        return value
    return jnp.concatenate([value, jnp.zeros((rows * group, lanes - head_dim), value.dtype)], axis=1)


def store_rows(ref: Any, value: jax.Array, interpret: bool) -> None:
    """Stores a value [rows * G, lanes] to ref [rows, G, D], in the reference's dtype, without the lanes past D."""
    value = value[:, : ref.shape[2]].astype(ref.dtype)
    if interpret:
        ref[...] = value.reshape(ref.shape)
    else:
        _words_of_rows(ref)[...] = pltpu.bitcast(value, jnp.uint32) if ref.dtype.itemsize < 4 else value


def _words_of_rows(ref: Any) -> Any:
    rows, group, head_dim = ref.shape
    packing = 4 // ref.dtype.itemsize
    words = ref.bitcast(jnp.uint32) if packing > 1 else ref
    return words.reshape(rows * group // packing, head_dim)


def fill_with_zero(ref: Any, interpret: bool) -> None:
    """Sets [2, N, W, 1, Dp] to 0, whole registers at a time."""
    if interpret:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
        return
    size = ref.shape[0] * ref.shape[1] * ref.shape[2] * ref.shape[4] // LANES
    rows = 512 if size % 512 == 0 else 8
    flat = ref.reshape(size, LANES)

    def fill(part: jax.Array, carry: None) -> None:
        flat[pl.ds(pl.multiple_of(part * rows, rows), rows), :] = jnp.zeros((rows, LANES), ref.dtype)
        return carry

    jax.lax.fori_loop(0, size // rows, fill, None)
