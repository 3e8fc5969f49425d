"""Fills a model's parameters from its files, one parameter at a time, with little more memory than they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress, Task
from llm_infer.quant import StoredWeights
from llm_infer.weights.aligned import aligned_empty
from llm_infer.weights.reports import tensor_report
from llm_infer.weights.rules import HasShape, Rule
from llm_infer.weights.stored_blocks import Kinds, read_stored, stored_bytes, stored_kinds
from llm_infer.weights.tensor_source import TensorSource
from pallas_kernels.quant_matmul import tiles_pay

Place = Callable[[str, np.ndarray], jax.Array]


def load_parameters(
    source: TensorSource,
    specs: Mapping[str, HasShape],
    rules: Sequence[Rule],
    *,
    num_layers: int,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
    place: Place | None = None,
    stored: str | None = None,
    cuts: Callable[[str], int] | None = None,
) -> dict[str, jax.Array | StoredWeights]:
    """Reads all parameters of a model.

    Peak host memory beside the parameters already placed is one parameter and a few MB; on the CPU the parameter
    becomes the JAX array itself.

    Args:
        source: the model's tensors.
        specs: parameter name → shape and type; stacked parameters are [L, …].
        rules: where each parameter comes from.
        num_layers: L.
        ignore: regular expressions (full match) of tensors that no rule uses and that may be there all the same.
        progress: reports bytes of parameters; None is silent.
        place: moves a filled host array to its devices; `jax.device_put` to the default device when None.
        stored: keep matrices as the file stores them, to be multiplied in this precision (see `StoredWeights`); None
            reads all values into the type of their spec.
        cuts: number of devices over which `place` cuts the rows of a parameter's matrices; None is one.

    Returns:
        The parameters by name, in the order of `rules`.

    Raises:
        ModelError: tensors are missing, surplus, of the wrong shape or no floats. They are found before anything is read, and
            all listed in one message.
    """
    by_param = {rule.param: rule for rule in rules}
    unruled = sorted(set(specs) - set(by_param))
    unknown = sorted(rule.param for rule in rules if rule.param not in specs and not rule.optional)
    if unruled or unknown or len(by_param) != len(rules):
        raise ValueError(
            f"rules and parameters differ: parameters without a rule {unruled}, rules without a parameter {unknown}"
        )

    names = set(source.names)
    if num_layers > len(names):  # before any list is made that is as long as the config claims
        raise ModelError(f"{source.description}: the config says {num_layers} layers, there are {len(names)} tensors")
    # An optional parameter is left out if the file holds none of its tensors.
    wanted = [
        rule
        for rule in rules
        if rule.param in specs
        and not (rule.optional and names.isdisjoint(n for group in rule.tensor_names(num_layers) for n in group))
    ]
    _check(source, names, specs, rules, wanted, num_layers, ignore)

    whole = place is None  # on one device: the order of rows may change
    place = place or (lambda _, array: jax.device_put(array))
    kept: dict[str, Kinds | None] = {}
    if stored is not None:
        kept = {r.param: stored_kinds(source, r, num_layers, cuts(r.param) if cuts else 1) for r in wanted}
    total = sum(stored_bytes(kept.get(rule.param), specs[rule.param]) for rule in wanted)
    parameters: dict[str, jax.Array | StoredWeights] = {}
    with (progress or Progress.silent()).task("Loading weights", total=total, unit="bytes") as task:
        for rule in wanted:
            spec = specs[rule.param]
            if (kinds := kept.get(rule.param)) is not None:
                assert stored is not None
                tiled = {kind for kind in kinds if whole and tiles_pay(kind, spec.shape[-2])}
                stacks, places = read_stored(source, rule, num_layers, kinds, spec.shape, task, tiled)
                blocks = tuple(jax.block_until_ready(place(rule.param, stack)) for stack in stacks.values())
                parameters[rule.param] = StoredWeights(
                    blocks, tuple(stacks), places, stored, tuple(kind in tiled for kind in stacks)
                )
                continue
            array = aligned_empty(spec.shape, spec.dtype)
            _fill(source, rule, array, num_layers, task)
            # Waiting bounds the host memory: at most one parameter is on its way to the device.
            parameters[rule.param] = jax.block_until_ready(place(rule.param, array))
            del array
    return parameters


def read_parameters(
    source: TensorSource,
    specs: Mapping[str, HasShape],
    wanted: Sequence[Rule],
    rules: Sequence[Rule],
    *,
    num_layers: int,
    ignore: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Reads some of a model's parameters, as host arrays; arguments as of `load_parameters`.

    Args:
        wanted: rules of the parameters to read; tensors of other `rules` may be there.

    Raises:
        ModelError: as `load_parameters`.
    """
    _check(source, set(source.names), specs, rules, wanted, num_layers, ignore)
    found = {}
    for rule in wanted:
        found[rule.param] = aligned_empty(specs[rule.param].shape, specs[rule.param].dtype)
        _fill(source, rule, found[rule.param], num_layers, Task("Reading weights", None, "bytes"))
    return found


def _fill(source: TensorSource, rule: Rule, array: np.ndarray, num_layers: int, task: Task) -> None:
    """Reads the tensors of all layers into `array`."""
    slices = array if rule.stacked else array[None]
    for out, group in zip(slices, rule.tensor_names(num_layers), strict=True):
        if rule.arrange is None:
            source.read_into(group[0], out)
        else:
            parts = [np.empty(source.shape(name), array.dtype) for name in group]
            for name, part in zip(group, parts, strict=True):
                source.read_into(name, part)
            out[...] = rule.arrange(parts)
        task.advance(out.nbytes)


def _check(
    source: TensorSource,
    names: set[str],
    specs: Mapping[str, HasShape],
    rules: Sequence[Rule],
    wanted: Sequence[Rule],
    num_layers: int,
    ignore: Sequence[str],
) -> None:
    """Compares names, shapes and types of all tensors with what the parameters need."""
    missing: list[str] = []
    misshapen: list[str] = []
    not_float: list[str] = []
    for rule in wanted:
        spec = specs[rule.param]
        groups = rule.tensor_names(num_layers)
        expected = tuple(spec.shape[1:] if rule.stacked else spec.shape)
        if rule.stacked and spec.shape[0] != len(groups):
            raise ValueError(f"{rule.param} is stacked over {spec.shape[0]} layers, its rule names {len(groups)}")
        fits: dict[tuple[tuple[int, ...], ...], bool] = {}
        for group in groups:
            absent = [name for name in group if name not in names]
            missing += absent
            if absent:
                continue
            shapes = tuple(source.shape(name) for name in group)
            if shapes not in fits:
                fits[shapes] = _arranged_shape(rule, shapes) == expected
            if not fits[shapes]:
                found = " + ".join(f"{name} {list(shape)}" for name, shape in zip(group, shapes, strict=True))
                misshapen.append(f"{found} for {list(expected)}")
            if jnp.issubdtype(spec.dtype, jnp.floating):
                not_float += [
                    f"{n} ({source.dtype(n)})" for n in group if not jnp.issubdtype(source.dtype(n), jnp.floating)
                ]
    used = {name for rule in rules for group in rule.tensor_names(num_layers) for name in group}
    patterns = [re.compile(pattern) for pattern in ignore]
    surplus = [n for n in sorted(names - used, key=_natural) if not any(p.fullmatch(n) for p in patterns)]
    problems = {"missing": missing, "surplus": surplus, "wrong shape": misshapen, "not floats": not_float}
    if any(problems.values()):
        raise ModelError(
            f"{source.description}: the tensors are not those of the model's config: {tensor_report(problems)}"
        )


def _arranged_shape(rule: Rule, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...] | None:
    """Returns the shape of the parameter made of tensors of these shapes; None if they do not go together."""
    if rule.arrange is None:
        return shapes[0]
    try:
        # One byte seen from every index: only the result takes memory, a quarter of one layer's parameter.
        return rule.arrange([np.broadcast_to(np.uint8(0), shape) for shape in shapes]).shape
    except (ValueError, IndexError):  # numpy and `fuse_qkv` raise them where shapes do not fit
        return None


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a sort key with layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
