"""Turns the scaling of rotary frequencies, as GGUF stores it, into Hugging Face's `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.weights.gguf import GGUFFile, GGUFTensor

LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of LongRoPE, read as part of the config."""
ATTENTION_FACTOR = "rope.scaling.attn_factor"
YARN_KEYS = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
}


def rope_scaling(
    file: GGUFFile, prefix: str, theta: float, head_dim: int, factors: GGUFTensor | None
) -> dict[str, Any] | None:
    """Returns the `rope_scaling` entry of the config, or None when frequencies are not scaled.

    Args:
        prefix: "llama." or the like.
        theta: base of the frequencies.
        head_dim: D.
        factors: float [D/2] divisors of the frequencies, if the file has them (Llama 3.1 and later).

    Raises:
        ModelError: the kind of scaling has no name in Hugging Face's config.
    """
    kind_key = prefix + "rope.scaling.type"
    kind = file.require(kind_key, str) if kind_key in file.metadata else "none"
    if LONG_FACTORS[0] in file.tensors:
        return _longrope(file, prefix)
    if factors is not None:
        if kind not in ("none", "llama3"):
            raise ModelError(f"{file.path}: rope scaling {kind!r} together with {factors.name} is not supported")
        return _llama3(file, factors, theta, head_dim)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not supported, expected none, linear or yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": file.require(prefix + "rope.scaling.factor", float) or 1.0}
    original = prefix + "rope.scaling.original_context_length"
    if original in file.metadata:
        scaling["original_max_position_embeddings"] = file.require(original, int)
    for key, name in YARN_KEYS.items():
        if prefix + key in file.metadata:
            scaling[name] = float(str(np.float32(file.require(prefix + key, float))))
    if scaling.get("mscale_all_dim"):
        scaling["mscale"] = 1.0  # llama.cpp has one of the two numbers, the quotient's lower
    return scaling


def _longrope(file: GGUFFile, prefix: str) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for name, key in zip(LONG_FACTORS, ("long_factor", "short_factor"), strict=True):
        if name not in file.tensors or len(file.tensors[name].shape) != 1:
            raise ModelError(f"{file.path}: expected a list of numbers in each of {' and '.join(LONG_FACTORS)}")
        values = np.empty(file.tensors[name].shape, np.float32)
        file.tensors[name].read_into(values)
        scaling[key] = [float(str(value)) for value in values]
    scaling["original_max_position_embeddings"] = file.require(prefix + "rope.scaling.original_context_length", int)
    if prefix + ATTENTION_FACTOR in file.metadata:
        scaling["attention_factor"] = float(str(np.float32(file.require(prefix + ATTENTION_FACTOR, float))))
    return scaling


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Returns the divisors of the rotary frequencies, float64 [D/2], of Llama 3.1's scaling.

    Wavelengths up to original/high stay, those from original/low on are divided by `factor`, and between them the two
    are blended linearly in 1/wavelength (Llama 3.1 reference code, `apply_scaling`).
    """
    wavelengths = _wavelengths(theta, head_dim)
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)


def _llama3(file: GGUFFile, tensor: GGUFTensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Recovers the four parameters from the divisors.

    The file stores only the divisors. Blended ones obey blend = original/(wavelength·(high-low)) - low/(high-low): a
    line in 1/wavelength. Its two coefficients give three unknowns once low_freq_factor is 1, as in every Llama 3
    release; the result is then checked against all the divisors.
    """
    if tensor.shape != (head_dim // 2,) or tensor.dtype != np.float32:
        raise ModelError(
            f"{file.path}: {tensor.name} is {tensor.type} {list(tensor.shape)}, expected F32 [{head_dim // 2}]"
        )
    divisors = np.empty(tensor.shape, np.float32)
    tensor.read_into(divisors)
    if np.all(divisors == 1.0):
        return None
    factor = float(divisors.max())
    if np.all(np.isfinite(divisors)) and divisors.min() >= 1.0:
        blended = (divisors > 1.0) & (divisors < factor)
        blend = (1.0 / divisors[blended] - 1.0 / factor) / (1.0 - 1.0 / factor)
        if blended.sum() >= 2:
            slope, offset = np.polyfit(1.0 / _wavelengths(theta, head_dim)[blended], blend, 1)
            if offset < 0 < slope:
                high, original = round(1.0 - 1.0 / offset, 3), round(-slope / offset)
                fitted = llama3_factors(theta, head_dim, factor, 1.0, high, original)
                if np.allclose(fitted, divisors, rtol=1e-4):
                    return {
                        "rope_type": "llama3",
                        "factor": factor,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": high,
                        "original_max_position_embeddings": original,
                    }
    raise ModelError(
        f"{file.path}: the frequency divisors in {tensor.name} do not follow Llama 3 scaling with low_freq_factor=1: "
        "use the model's Hugging Face directory instead"
    )
