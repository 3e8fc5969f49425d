"""The tiny checkpoints of every family and what transformers computed with them (tests/goldens/families)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.models.layer_runs import Run, layer_runs
from llm_infer.models.load import LoadedModel, load_model
from llm_infer.models.opened import open_model
from llm_infer.models.params import merge_model
from llm_infer.weights.sources import resolve

FOLDER = Path(__file__).parents[1] / "goldens" / "families"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


@dataclass(frozen=True)
class Golden:
    """Prompts, greedy tokens, logits [T, V] of each prompt, and every layer's output [L, T, E] for the first."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[np.ndarray]
    hidden: np.ndarray


@cache
def golden(name: str) -> Golden:
    data = np.load(FOLDER / name / "golden.npz")
    return Golden(
        [data[f"prompt_{i}"].tolist() for i in range(2)],
        [data[f"tokens_{i}"].tolist() for i in range(2)],
        [data[f"logits_{i}"] for i in range(2)],
        data["hidden"],
    )


@cache
def load(name: str, *, fused_qkv: bool = True, dtype: str = "float32") -> LoadedModel:
    """A checkpoint through the loader, as a user's directory."""
    opened = open_model(resolve(str(FOLDER / name)))
    return load_model(opened, dtype=jnp.dtype(dtype), fused_qkv=fused_qkv)


def dense_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: object,
    layer: object,
    /,
    *,
    scale: float,
    window: jax.Array | int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> tuple:
    """Causal attention over the keys of this call alone, in float32: no pages, no cache."""
    group, tokens = query.shape[1] // key.shape[1], query.shape[0]
    key, value = (jnp.repeat(a.astype(jnp.float32), group, axis=1) for a in (key, value))
    scores = jnp.einsum("qhd,khd->hqk", query.astype(jnp.float32), key) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.tril(jnp.ones(scores.shape[1:], bool))[None]
    if window is not None:
        age = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None]
        seen &= (age < window)[None]
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], axis=2)
    weights = jax.nn.softmax(scores, axis=-1)[:, :, :tokens]
    return jnp.einsum("hqk,khd->qhd", weights, value).astype(query.dtype), cache


class DenseAttend:
    """`dense_attend` with convolutions over the inputs of this call alone."""

    def __call__(self, *arrays: Any, **options: Any) -> tuple:
        return dense_attend(*arrays, **options)

    def causal_conv(
        self, inputs: jax.Array, taps: jax.Array, cache: object, layer: object, /
    ) -> tuple[jax.Array, object]:
        width, length = taps.shape[1], len(inputs)
        padded = jnp.pad(inputs.astype(jnp.float32), ((width - 1, 0), (0, 0)))
        out = sum(padded[k : k + length] * taps[:, k].astype(jnp.float32)[None] for k in range(width))
        return jnp.asarray(out, inputs.dtype), cache


def dense_run(model: LoadedModel) -> Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]:
    """What `dense` computes, compiled once for each length."""

    @jax.jit
    def run(params: dict[str, jax.Array], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoder = merge_model(model.definition, params)
        positions = jnp.arange(len(ids), dtype=jnp.int32)
        angles = decoder.angles(positions)

        def layer(run: Run, x: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = []
            for offset, kind in enumerate(run.kinds):
                x, _ = decoder.layers(x, angles, None, first + offset, DenseAttend(), **kind.options)
                found.append(x)
            return x, jnp.stack(found)

        x, found = decoder.embed_tokens(ids, positions), []
        for each in layer_runs(model.config):
            x, hidden = jax.lax.scan(partial(layer, each), x, jnp.array(each.firsts, jnp.int32))
            found.append(hidden.reshape(-1, *x.shape))
        return decoder.logits(x), jnp.concatenate(found)

    def call(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        logits, hidden = run(model.params, jnp.asarray(ids, jnp.int32))
        return np.asarray(logits), np.asarray(hidden.astype(jnp.float32))

    return call


def dense(model: LoadedModel, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] and the output of every layer [L, T, E], without pages."""
    return dense_run(model)(ids)
