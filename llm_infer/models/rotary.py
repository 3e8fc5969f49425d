"""Rotary positions: frequencies and how they are scaled, the angles of a step, and the rotation of heads."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_infer.models.config import ModelConfig, RopeConfig
from llm_infer.models.layers import Layer

Angles = tuple[Array, ...] | None
"""Cosine and sine of each position's rotation, [T, H] for the first 2 · H elements of a head; [R, T, H] where layers differ, see
`tables`. A third array [T, 1] multiplies queries, where the model scales them by position. None for models without rotary
positions."""


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Computes angular frequencies [H] in float32, scaled."""
    rotated = config.rotated(head_dim)
    plain = 1.0 / config.theta ** (np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated))
    if config.factor != 1.0 or config.kind == "longrope":
        plain = plain * _kept(config, plain, rotated)
    return plain.astype(np.float32)


def _kept(config: RopeConfig, plain: np.ndarray, rotated: int) -> np.ndarray | float:
    """Returns by what each frequency is multiplied in the scaling."""
    if config.kind == "linear":
        return 1.0 / config.factor
    if config.kind == "longrope":
        return 1.0 / np.array(config.long_factors if config.long else config.short_factors, np.float32)
    if config.kind == "llama3":  # formula of Meta's release: by the wavelength
        wavelength = 2 * np.pi / plain
        low, high = config.low_freq_factor, config.high_freq_factor
        whole = np.clip((config.original_max_position / wavelength - low) / (high - low), 0.0, 1.0)
        return whole + (1 - whole) / config.factor
    # YaRN (Peng et al., 2023): linear between the elements that turn beta_fast and beta_slow times.

    def element(turns: float) -> float:
        return rotated * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = element(config.beta_fast), element(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    divided = np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return divided / config.factor + (1 - divided)


def tables(config: ModelConfig) -> tuple[tuple[RopeConfig | None, ...], tuple[int, ...]]:
    """Returns the different rotations of the layers, and of each layer the number of its own."""
    each = config.layer_ropes or (config.rope,) * config.num_layers
    different = tuple(dict.fromkeys(each))
    return different, tuple(different.index(rope) for rope in each)


def angles(config: ModelConfig, positions: Int[Array, " T"]) -> Angles:
    """Computes cosine and sine of the rotations of all layers, float32."""
    different, _ = tables(config)
    widths = {rope.rotated(config.head_dim) // 2 for rope in different if rope is not None}
    if not widths:
        return None
    (width,) = widths

    def table(rope: RopeConfig | None) -> tuple[Array, Array]:
        shape = (positions.shape[0], width)
        if rope is None:  # a rotation by nothing
            return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        turned = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies(rope, config.head_dim))[None, :]
        cos, sin = jnp.cos(turned), jnp.sin(turned)
        return (cos, sin) if rope.amplitude == 1.0 else (cos * rope.amplitude, sin * rope.amplitude)

    made = [table(rope) for rope in different]
    if len(made) == 1:
        (rope,) = different
        if rope is None or not rope.query_beta:
            return made[0]
        passed = jnp.floor(positions.astype(jnp.float32) / rope.original_max_position)
        return *made[0], (1 + rope.query_beta * jnp.log1p(passed))[:, None]
    return jnp.stack([cos for cos, _ in made]), jnp.stack([sin for _, sin in made])


def angles_of(config: ModelConfig, angles: Angles, layer: Layer) -> Angles:
    """Picks a layer's angles."""
    if angles is None or angles[0].ndim == 2:
        return angles
    number = jnp.array(tables(config)[1], jnp.int32)[layer]
    cos, sin = (jnp.take(each, number, axis=0, mode="clip") for each in angles)
    return cos, sin


def rotate(
    query: Float[Array, "T Hq D"], key: Float[Array, "T Hkv D"], angles: tuple[Array, ...]
) -> tuple[Float[Array, "T Hq D"], Float[Array, "T Hkv D"]]:
    """Rotates queries and keys, and scales queries where the model does."""
    cos, sin, *scale = angles
    turned = _rotated(query, cos, sin)
    if scale:
        turned = turned * scale[0][:, None]
    return turned.astype(query.dtype), _rotated(key, cos, sin).astype(key.dtype)


def _rotated(x: Float[Array, "T N D"], cos: Float[Array, "T H"], sin: Float[Array, "T H"]) -> Float[Array, "T N D"]:
    """Rotates the two halves of the first elements of each head, as many as there are angles for; in float32."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)
