"""Quantises weights to 8 and 4 bits, and packs two int4 numbers in a byte."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def pack_int4(weights: jax.Array, groups: int) -> jax.Array:
    """Packs Int[..., K] in -8 … 7 into UInt8[..., K/2], with K in `groups` equal groups of H.

    Byte j of a group holds its number j + 8 in the low half and number j + H/2 + 8 in the high half, so that both halves of
    a tile of bytes belong to consecutive activations (as in ggml's q4_0).
    """
    split = weights.astype(jnp.uint8).reshape(*weights.shape[:-1], groups, 2, -1) + jnp.uint8(8)
    packed = (split[..., 0, :] & 15) | ((split[..., 1, :] & 15) << 4)
    return packed.reshape(*weights.shape[:-1], weights.shape[-1] // 2)


def unpack_int4(packed: jax.Array, groups: int) -> jax.Array:
    """Unpacks to Int8[..., K], the inverse of `pack_int4`."""
    split = packed.reshape(*packed.shape[:-1], groups, -1)
    both = jnp.stack([split & 15, split >> 4], axis=-2).astype(jnp.int8) - jnp.int8(8)
    return both.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def quantise(weights: jax.Array, kind: str, groups: int = 1) -> tuple[jax.Array, jax.Array]:
    """Returns (weights, scales) for `scaled_matmul`, symmetric: a group's largest magnitude is the kind's largest number.

    Args:
        weights: Float[Array, "... N K"].
        kind: int8, int4, float8_e4m3fn or float8_e5m2.
        groups: B, equal groups of K.

    Raises:
        ValueError: the kind is unknown.
    """
    limits: dict[str, float] = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
    if kind not in limits:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(limits)}")
    split = weights.astype(jnp.float32).reshape(*weights.shape[:-1], groups, -1)
    scales = jnp.max(jnp.abs(split), axis=-1, keepdims=True) / limits[kind]
    numbers = (split / jnp.where(scales == 0, 1.0, scales)).reshape(weights.shape)
    if kind.startswith("float8"):
        dtype: Any = jnp.dtype(kind)
        return numbers.astype(dtype), scales[..., 0]
    whole = jnp.round(numbers).astype(jnp.int8)
    return (pack_int4(whole, groups) if kind == "int4" else whole), scales[..., 0]
