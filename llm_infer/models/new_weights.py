"""Puts new weights in the place of a model's: of the same shapes, types and devices, so that compiled steps take them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llm_infer.base.errors import ModelError
from llm_infer.models.config import UNCUT, ModelConfig
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import Params, listed, refuse_absent, refuse_deleted, split_model
from llm_infer.models.registry import FAMILIES, family
from llm_infer.models.sharded import Placement
from llm_infer.models.tied_head import HEAD, embedding_name
from llm_infer.quant import StoredWeights
from llm_infer.weights.array_source import ArraySource
from llm_infer.weights.loader import read_parameters
from llm_infer.weights.requantise import requantised, why_not_requantised
from llm_infer.weights.rules import Rule
from llm_infer.weights.tensor_source import TensorSource
from pallas_kernels.quant_matmul.formats import DENSE

NewWeights = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Arrays by name, in nested mappings or not, or pairs of both."""

Described = Array | jax.ShapeDtypeStruct
"""An array, or what it was before its memory was given back."""


def with_weights(model: LoadedModel, given: NewWeights, *, copy: bool = False) -> LoadedModel:
    """Returns the model with these weights; what is not given stays.

    Names are those of `model.params`, or Hugging Face's: then a parameter needs all of its tensors. An array that has the
    type, shape and sharding of the one before is taken by reference; others are converted and brought to its devices. On a
    mesh, an array of another sharding is taken for the whole parameter, as it is on one device.

    Args:
        model: a model that runs.
        given: the weights: arrays of JAX or NumPy, or what NumPy can read.
        copy: take no array by reference, because its owner is going to donate or overwrite it.

    Raises:
        ModelError: names that the model does not have, missing tensors, other shapes, arrays that were deleted, or blocks that
            cannot be made here; nothing has changed then.
    """
    arrays = _read(given)
    if not arrays:
        raise ModelError("there are no weights: expected arrays by name")
    unknown = sorted(arrays.keys() - model.params.keys())
    if unknown and (len(unknown) < len(arrays) or model.config.own is not None):
        raise ModelError(f"the model has no parameter {listed(unknown)}: it has {listed(list(model.params))}")
    if unknown:
        arrays = _of_hugging_face(model, arrays)
    placement = None if model.mesh is None else Placement(model.config, model.mesh)
    whole = split_model(whole_config(model.config), model.dtype)[1]
    problems = [
        problem
        for name, array in arrays.items()
        if (problem := _why_not(name, model.params[name], array, whole[name].shape)) is not None
    ]
    if problems:
        raise ModelError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
    fitted = {name: _fitted(name, model.params[name], array, placement, copy) for name, array in arrays.items()}
    return replace(model, params={**model.params, **fitted})


def weights_digest(params: Params) -> str:
    """Returns SHA-256, in hexadecimal, over names, types, shapes and a sum over all bits of each parameter.

    The sums are of whole numbers and are made where the arrays are, so a digest does not depend on how the parameters
    are cut. It says whether two engines of the same settings have the same weights; it is no protection against a forger.

    Raises:
        ModelError: weights have been given up (`Runner.sleep`).
    """
    refuse_absent(params)
    digest = hashlib.sha256()
    sums = [
        (name, leaf, _bit_sums(leaf))
        for name, value in sorted(params.items())
        for leaf in jax.tree_util.tree_leaves(value)
    ]
    for name, leaf, both in sums:
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {np.asarray(both).tolist()}\n".encode())
    return digest.hexdigest()


@jax.jit
def _bit_sums(array: Array) -> Array:
    """Sums two hashes of each number's bits and place, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)

    def mixed(x: Array) -> Array:  # lowbias32 (Wellons, 2018): each bit of the input changes about half of the output's
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
        return x ^ (x >> jnp.uint32(16))

    hashes = [mixed(mixed(bits + jnp.uint32(seed)) ^ mixed(place + jnp.uint32(seed))) for seed in (1, 0x9E3779B9)]
    return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in hashes])


def whole_config(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of a model before it was cut over a mesh."""
    return replace(config, num_kv_heads=config.num_kv_heads // config.shards.kv_copies, shards=UNCUT)


def _read(given: NewWeights) -> dict[str, Any]:
    """Returns arrays of JAX or NumPy by name.

    Raises:
        ModelError: something else is there, or a name is there twice.
    """
    arrays: dict[str, Any] = {}
    try:
        for name, value in _pairs(given):
            if name in arrays:
                raise ModelError(f"{name} is there twice")
            arrays[name] = value
    except (TypeError, ValueError) as error:
        raise ModelError(f"expected arrays by name, or pairs of names and arrays: {error!s:.200}") from None
    refuse_deleted(arrays)
    return {n: value if isinstance(value, StoredWeights) else as_array(n, value) for n, value in arrays.items()}


def as_array(name: str, value: Any) -> Array | np.ndarray:
    """Returns an array of JAX as it is, and others' as NumPy reads them.

    Raises:
        ModelError: it is no array.
    """
    if isinstance(value, Array):
        return value
    try:
        return np.asarray(value)
    except Exception as error:  # what others' arrays raise is theirs
        raise ModelError(f"{name} is {type(value).__name__}, expected an array: {error!s:.200}") from None


def _pairs(given: NewWeights, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields names and arrays of nested mappings, the names joined by dots."""
    for name, value in given.items() if isinstance(given, Mapping) else given:
        if not isinstance(name, str):
            raise ModelError(f"{prefix}{name!s:.80}: expected a name that is a text")
        if isinstance(value, list | tuple) and any(isinstance(each, Mapping | Array | np.ndarray) for each in value):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _of_hugging_face(model: LoadedModel, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Makes stacked parameters of tensors under Hugging Face's names."""
    if blocks := [name for name, value in arrays.items() if isinstance(value, StoredWeights)]:
        raise ModelError(f"{listed(blocks)}: matrices in blocks have the names of the model's parameters")
    config = whole_config(model.config)
    module = family({"architectures": [config.architecture]})
    specs = split_model(config, model.dtype)[1]
    rules = [rule for rule in module.rules(config) if rule.param in specs]
    if config.tie_word_embeddings:
        arrays = _one_table(arrays, rules)
    source: TensorSource = ArraySource(arrays)
    if (arranged := getattr(module, "tensors", None)) is not None:
        source = arranged(source)
    names = set(source.names)
    found = {name for rule in rules for group in rule.tensor_names(config.num_layers) for name in group}
    if not found & names:
        own = FAMILIES[config.architecture].module.rpartition(".")[2]
        raise ModelError(
            f"{listed(sorted(arrays))}: neither parameters of the model ({listed(list(model.params))}) nor tensors as "
            f"Hugging Face names them for {own}"
        )
    given = [r for r in rules if any(n in names for group in r.tensor_names(config.num_layers) for n in group)]
    return read_parameters(source, specs, given, rules, num_layers=config.num_layers, ignore=module.IGNORED_TENSORS)


def _one_table(arrays: Mapping[str, Any], rules: Sequence[Rule]) -> Mapping[str, Any]:
    """Returns the tensors of a model whose head is its embedding with that alone, whatever it was called."""
    arrays, embedding = dict(arrays), embedding_name(rules)
    if (head := arrays.pop(HEAD, None)) is None:
        return arrays
    if not np.array_equal(arrays.setdefault(embedding, head), head):
        raise ModelError(f"{HEAD} differs from {embedding}, and the model has one for both")
    return arrays


def _why_not(name: str, old: Described | StoredWeights, new: Any, whole: tuple[int, ...]) -> str | None:
    """Says why an array cannot take the place of a parameter; None if it can."""
    if isinstance(new, StoredWeights):
        if isinstance(old, StoredWeights) and _form(old) == _form(new):
            return None
        return f"{name} is in other blocks than the model's: give it as plain numbers"
    legal = {whole} | ({(1, *whole)} if isinstance(old, StoredWeights) and len(whole) == 2 else set())
    first = old.blocks[0] if isinstance(old, StoredWeights) else old
    if _in_place(new, first):
        legal.add(tuple(old.shape))
    if new.shape not in legal:
        return f"{name} has the shape {list(new.shape)}, expected {list(whole)}"
    if not jnp.issubdtype(new.dtype, jnp.floating):
        return f"{name} has the type {new.dtype}, expected floating-point numbers"
    if isinstance(old, StoredWeights):
        for kind in old.kinds:
            if (reason := why_not_requantised(kind)) is not None:
                return f"{name} is kept in blocks of {kind}: {reason}; make the LLM with weights='dense'"
    return None


def _form(weights: StoredWeights) -> tuple[Any, ...]:
    """Returns all but the values."""
    return weights.kinds, weights.places, weights.tiled, [block.shape for block in weights.blocks]


def _in_place(new: Any, old: Described) -> bool:
    """Tells whether an array has the shape and the place of another, so that it is the parameter as the engine has it."""
    return isinstance(new, Array) and new.shape == old.shape and new.sharding.is_equivalent_to(old.sharding, old.ndim)


def _fitted(
    name: str, old: Described | StoredWeights, new: Any, placement: Placement | None, copy: bool
) -> Array | StoredWeights:
    """Returns an array as the parameter that it replaces is kept."""
    if isinstance(new, StoredWeights):
        assert isinstance(old, StoredWeights)
        pairs = zip(old.blocks, new.blocks, strict=True)
        return replace(old, blocks=tuple(_placed(name, block, other, None, copy) for block, other in pairs))
    if not isinstance(old, StoredWeights):
        return _placed(name, old, new, placement, copy)
    stacked = new if len(np.shape(new)) == 3 else new[None]
    if len(old.blocks) == 1 and old.kinds[0] in DENSE.values():
        return replace(old, blocks=(_placed(name, old.blocks[0], stacked, placement, copy),))
    dense = np.asarray(stacked)
    blocks = []
    for number, (kind, stack) in enumerate(zip(old.kinds, old.blocks, strict=True)):
        layers = [layer for layer, (place, _) in enumerate(old.places) if place == number]
        made = requantised(dense[layers], kind, tiled=old.is_tiled(number))
        blocks.append(_placed(name, stack, made, placement, copy=False))
    return replace(old, blocks=tuple(blocks))


def _placed(name: str, old: Described, new: Any, placement: Placement | None, copy: bool) -> Array:
    """Brings an array to the devices and into the type of another."""
    if isinstance(new, Array) and _in_place(new, old):
        return jnp.array(new, old.dtype, copy=True) if copy else new.astype(old.dtype)
    if placement is None:
        host = new if isinstance(new, Array) else np.array(new, old.dtype)
        return jax.device_put(host, old.sharding).astype(old.dtype)
    if isinstance(new, Array):  # from device to device, as a trainer with another sharding wants it
        return jax.device_put(_arranged(new, placement, name, jnp.dtype(old.dtype)), old.sharding)
    return placement(name, np.asarray(new).astype(old.dtype))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _arranged(array: Array, placement: Placement, name: str, dtype: jnp.dtype) -> Array:
    """Arranges a parameter for a mesh on the devices where it is."""
    return placement.arrange(name, array.astype(dtype))
