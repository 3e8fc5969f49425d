"""Says how each tensor of a Hugging Face file is made of a model's parameters, for every family."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_infer.models.config import ModelConfig
from llm_infer.models.new_weights import whole_config
from llm_infer.models.params import split_model
from llm_infer.models.registry import family
from llm_infer.weights.undo_rules import Undo, undo

_HEADS = {"q_proj": "num_heads", "k_proj": "num_kv_heads", "v_proj": "num_kv_heads"}
"""Projections that are together in one parameter and differ in size → the number of their heads."""


def undoings(config: ModelConfig, dtype: DTypeLike = jnp.float32, *, stacks: bool = True) -> list[Undo]:
    """Returns what makes all tensors of parameters of a whole model.

    Args:
        config: of the model; if it is cut, that of the whole one is taken.
        dtype: of the parameters.
        stacks: whether a family whose files stack experts has them so; else each expert is alone, as its rules name it.
    """
    whole = whole_config(config)
    module = family({"architectures": [whole.architecture]})

    def rows(tensor: str) -> int | None:
        heads = next((_HEADS[part] for part in tensor.split(".") if part in _HEADS), None)
        return None if heads is None else getattr(whole, heads) * whole.head_dim

    found = undo(module.rules(whole), split_model(whole, dtype)[1], rows)
    together = module.stacks(whole) if stacks and hasattr(module, "stacks") else []
    taken = {name for each in together for name in each.params}
    return [*(each for each in found if taken.isdisjoint(each.params)), *together]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that new weights may have, by Hugging Face's name; experts are alone."""
    specs = split_model(whole_config(config))[1]
    found = {}
    for each in undoings(config, stacks=False):
        shapes = each.shapes(specs)
        for names in each.groups(config.num_layers):
            found |= dict(zip(names, shapes, strict=True))
    return found
