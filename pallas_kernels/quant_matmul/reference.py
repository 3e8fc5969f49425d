"""Quantised matmul the obvious way: it dequantises every weight to float32, then takes a float32 dot. The oracle of the
others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import Case
from pallas_kernels.quant_matmul.formats import FORMATS, VALUES
from pallas_kernels.quant_matmul.inputs import Norm, prepared
from pallas_kernels.quant_matmul.tiles import untile


def _f16(bytes_: Array) -> Array:
    """Turns [..., 2] uint8 into [...] float32 through little-endian float16."""
    return jax.lax.bitcast_convert_type(bytes_, jnp.float16).astype(jnp.float32)


def _nibbles(qs: Array) -> tuple[Array, Array]:
    """Returns the low and the high four bits as float32."""
    return (qs & 15).astype(jnp.float32), (qs >> 4).astype(jnp.float32)


def _q4_0(b: Array) -> Array:
    low, high = _nibbles(b[..., 2:])
    return _f16(b[..., 0:2])[..., None] * (jnp.concatenate([low, high], -1) - 8.0)


def _q4_1(b: Array) -> Array:
    low, high = _nibbles(b[..., 4:])
    return _f16(b[..., 0:2])[..., None] * jnp.concatenate([low, high], -1) + _f16(b[..., 2:4])[..., None]


def _fifth_bits(b: Array) -> Array:
    """Turns [..., 4] bytes into their 32 bits, lowest first, as 16 or 0 in float32: the fifth bits of 32 weights."""
    return jnp.stack([b >> i & 1 for i in range(8)], -1).reshape(*b.shape[:-1], 32).astype(jnp.float32) * 16.0


def _q5_0(b: Array) -> Array:
    quants = jnp.concatenate(_nibbles(b[..., 6:]), -1) + _fifth_bits(b[..., 2:6])
    return _f16(b[..., 0:2])[..., None] * (quants - 16.0)


def _q5_1(b: Array) -> Array:
    quants = jnp.concatenate(_nibbles(b[..., 8:]), -1) + _fifth_bits(b[..., 4:8])
    return _f16(b[..., 0:2])[..., None] * quants + _f16(b[..., 2:4])[..., None]


def _looked_up(qs: Array, kind: str) -> Array:
    """Returns the float32 weights for which [..., 16] bytes stand: those of the low halves, then those of the high ones."""
    codes = jnp.concatenate([qs & 15, qs >> 4], -1)
    return jnp.asarray(VALUES[kind], jnp.float32).at[codes].get(mode="promise_in_bounds")


def _iq4_nl(b: Array) -> Array:
    return _f16(b[..., 0:2])[..., None] * _looked_up(b[..., 2:], "iq4_nl")


def _iq4_xs(b: Array) -> Array:
    low = jnp.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1)
    high = jnp.stack([b[..., 2:4] >> 2 * g & 3 for g in range(4)], -1)
    lead = b.shape[:-1]
    scale = (low.reshape(*lead, 8) | (high.reshape(*lead, 8) << 4)).astype(jnp.float32) - 32.0
    w = (_f16(b[..., 0:2])[..., None] * scale)[..., None] * _looked_up(b[..., 8:].reshape(*lead, 8, 16), "iq4_xs")
    return w.reshape(*lead, 256)


def _mxfp4(b: Array) -> Array:
    exponent = b[..., 0].astype(jnp.uint32)
    # The scale is half of 2^(exponent - 127), as the looked up weights are twice what FP4 says; the smallest are subnormal.
    bits = jnp.where(exponent < 2, jnp.uint32(1 << 21) << exponent, (exponent - 1) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None] * _looked_up(b[..., 1:], "mxfp4")


def _q8_0(b: Array) -> Array:
    return _f16(b[..., 0:2])[..., None] * jax.lax.bitcast_convert_type(b[..., 2:], jnp.int8).astype(jnp.float32)


def _pairs(b: Array) -> Array:
    """Turns [..., 64] bytes into 256 pairs of bits, in the order of the weights: 32 bytes give 32 lowest pairs, 32 next …"""
    halves = b.reshape(*b.shape[:-1], 2, 32)
    return jnp.stack([halves >> 2 * i & 3 for i in range(4)], -2)


def _q2_k(b: Array) -> Array:
    lead = b.shape[:-1]
    scale, minimum = _nibbles(b[..., 0:16])
    quants = _pairs(b[..., 16:80]).reshape(*lead, 16, 16).astype(jnp.float32)
    d, dmin = _f16(b[..., 80:82])[..., None], _f16(b[..., 82:84])[..., None]
    return ((d * scale)[..., None] * quants - (dmin * minimum)[..., None]).reshape(*lead, 256)


def _q3_k(b: Array) -> Array:
    lead = b.shape[:-1]
    third = jnp.stack([b[..., 0:32] >> i & 1 for i in range(8)], -2).reshape(*lead, 16, 16)
    quants = (_pairs(b[..., 32:96]).reshape(*lead, 16, 16) | (third << 2)).astype(jnp.float32) - 4.0
    low = jnp.concatenate([b[..., 96:104] & 15, b[..., 96:104] >> 4], -1)
    high = jnp.concatenate([b[..., 104:108] >> 2 * i & 3 for i in range(4)], -1)
    scale = (low | (high << 4)).astype(jnp.float32) - 32.0
    return ((_f16(b[..., 108:110])[..., None] * scale)[..., None] * quants).reshape(*lead, 256)


def _k_scales(s: Array) -> tuple[Array, Array]:
    """Unpacks [..., 12] bytes to eight 6-bit scales and eight 6-bit minima, [..., 8] float32 each."""
    a, b, c = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = jnp.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], -1)
    minimum = jnp.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], -1)
    return scale.astype(jnp.float32), minimum.astype(jnp.float32)


def _k_affine(b: Array, quants: Array) -> Array:
    """Applies the scales of Q4_K and Q5_K to quants [..., 8, 32]."""
    scale, minimum = _k_scales(b[..., 4:16])
    d, dmin = _f16(b[..., 0:2])[..., None], _f16(b[..., 2:4])[..., None]
    w = (d * scale)[..., None] * quants - (dmin * minimum)[..., None]
    return w.reshape(*b.shape[:-1], 256)


def _q4_k(b: Array) -> Array:
    low, high = _nibbles(b[..., 16:].reshape(*b.shape[:-1], 4, 32))
    return _k_affine(b, jnp.stack([low, high], -2).reshape(*b.shape[:-1], 8, 32))


def _q5_k(b: Array) -> Array:
    low, high = _nibbles(b[..., 48:].reshape(*b.shape[:-1], 4, 32))
    fifth = jnp.stack([b[..., 16:48] >> g & 1 for g in range(8)], -2).astype(jnp.float32) * 16.0
    return _k_affine(b, jnp.stack([low, high], -2).reshape(*b.shape[:-1], 8, 32) + fifth)


def _q6_k(b: Array) -> Array:
    lead = b.shape[:-1]
    ql = b[..., 0:128].reshape(*lead, 2, 2, 32)  # half, l or l + 32, l
    qh = b[..., 128:192].reshape(*lead, 2, 32)
    scale = jax.lax.bitcast_convert_type(b[..., 192:208], jnp.int8).astype(jnp.float32)
    lower = jnp.concatenate([ql & 15, ql >> 4], -2)  # [..., half, 4, 32]
    upper = jnp.stack([qh >> 2 * g & 3 for g in range(4)], -2)
    q = (lower | (upper << 4)).astype(jnp.float32) - 32.0
    w = (_f16(b[..., 208:210])[..., None] * scale)[..., None] * q.reshape(*lead, 16, 16)
    return w.reshape(*lead, 256)


_DEQUANTISE = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "iq4_nl": _iq4_nl, "mxfp4": _mxfp4,
    "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "iq4_xs": _iq4_xs,
}  # fmt: skip


def dequantise(blocks: Array, kind: str) -> Array:
    """Turns blocks [..., R] of the format's dtype into weights [..., K] float32.

    Raises:
        ValueError: the row is not a whole number of blocks.
    """
    fmt = FORMATS[kind]
    if fmt.dtype != "uint8":
        return blocks.astype(jnp.float32)
    k = fmt.row_elements(blocks.shape[-1])
    grouped = blocks.reshape(*blocks.shape[:-1], -1, fmt.bytes)
    return _DEQUANTISE[kind](grouped).reshape(*blocks.shape[:-1], k)


def layer_weights(blocks: Array, layer: Array, kind: str, tiled: bool) -> Array:
    """Returns the weights [N, K] float32 of one layer of blocks [L, N, R]; the others are not touched."""
    rows = jax.lax.dynamic_index_in_dim(blocks, layer, 0, keepdims=False)
    return dequantise(untile(rows, kind) if tiled else rows, kind)


def why_not(case: Case) -> str | None:
    """Refuses nothing: it runs everywhere, but dequantises a whole layer's matrix in each call."""
    del case
    return None


def quant_matmul(
    x: Array,
    blocks: Array,
    layer: Array,
    gate: Array | None = None,
    norm: Norm | None = None,
    *,
    kind: str,
    precision: str = "exact",
    tiled: bool = False,
) -> Array:
    """Dequantises and multiplies, see `pallas_kernels.quant_matmul.quant_matmul`; always exact."""
    del precision
    weights = layer_weights(blocks, layer, kind, tiled)
    return jnp.einsum("mk,nk->mn", prepared(x, gate, norm), weights, precision=jax.lax.Precision.HIGHEST)
