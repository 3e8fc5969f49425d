"""Reads matrices in the form in which their file stores them: which kinds a parameter has, and its stacks of blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Task
from llm_infer.weights.aligned import aligned_empty
from llm_infer.weights.rules import HasShape, Rule
from llm_infer.weights.tensor_source import TensorSource
from pallas_kernels.quant_matmul.formats import DENSE, FORMATS
from pallas_kernels.quant_matmul.tiles import ROWS

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
MOST_READERS = 8
"""Threads that read a matrix's layers; more do not read memory faster."""
_TABLES = ("embed.weight", "head.weight")  # their rows are looked up, or multiplied with as in any matrix

Kinds = tuple[str, ...]
"""The kind of each layer's matrix, a key of FORMATS."""


def stored_kinds(source: TensorSource, rule: Rule, num_layers: int, cuts: int = 1) -> Kinds | None:
    """Returns the kinds of a parameter's matrices, or None for a parameter that is no matrix or that no kernel takes.

    Tensors of different kinds that make up one matrix are read as float32.

    Raises:
        UserError: cutting a row into `cuts` parts, for as many devices, would cut blocks.
    """
    if not (rule.param.endswith(".weight") and (rule.stacked or rule.param in _TABLES)):
        return None
    kinds = []
    for group in rule.tensor_names(num_layers):
        if any(len(source.shape(name)) != 2 for name in group):
            return None
        width = source.shape(group[0])[1]
        found = {_kind(source, name) for name in group}
        kind = found.pop() if len(found) == 1 else "f32"
        if width % (cuts * FORMATS[kind].elements):
            if FORMATS[kind].dtype == "uint8" and width % FORMATS[kind].elements == 0:
                blocks = width // FORMATS[kind].elements
                near = min((n for n in range(1, blocks + 1) if blocks % n == 0), key=lambda n: abs(n - cuts))
                raise UserError(
                    f"{rule.param}: rows of {blocks} blocks of {kind} cannot be cut for {cuts} devices: set "
                    f"tensor_parallel_size × expert_parallel_size to {near} or another divisor of {blocks}"
                )
            return None
        kinds.append(kind)
    return tuple(kinds)


def stored_bytes(kinds: Kinds | None, spec: HasShape) -> int:
    """Returns the number of bytes that a parameter takes."""
    if kinds is None:
        return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
    rows, width = spec.shape[-2:]
    return sum(rows * FORMATS[kind].row_items(width) * FORMATS[kind].item_bytes for kind in kinds)


def read_stored(
    source: TensorSource,
    rule: Rule,
    num_layers: int,
    kinds: Kinds,
    shape: Sequence[int],
    task: Task,
    tiled: Collection[str],
) -> tuple[dict[str, np.ndarray], tuple[tuple[int, int], ...]]:
    """Reads a stack [layers of the kind, N, R] for each kind that occurs, and each layer's stack and index in it.

    Args:
        tiled: kinds whose rows are brought into the tiled order.
    """
    rows, width = shape[-2:]
    stacks = {
        kind: aligned_empty((count, rows, FORMATS[kind].row_items(width)), _dtype(FORMATS[kind].dtype))
        for kind, count in Counter(kinds).items()
    }
    filled: Counter[str] = Counter()
    places = []
    for kind in kinds:
        places.append((list(stacks).index(kind), filled[kind]))
        filled[kind] += 1

    groups, threads = list(rule.tensor_names(num_layers)), 1
    if tiled:  # only where native kernels run
        from pallas_kernels.cpu_ffi.threads import default_threads

        threads = min(MOST_READERS, default_threads())
    # A table is one matrix: its rows are shared out. Of layers there are enough.
    parts = threads if len(kinds) < threads and rule.arrange is None else 1
    size = -(-rows // (parts * ROWS)) * ROWS

    def read(layer: int, first: int) -> int:
        kind = kinds[layer]
        out = stacks[kind][places[layer][1]][first : first + size]
        tensors = [_rows(source, name, kind) for name in groups[layer]]
        # An arrangement moves whole rows, so it serves blocks as it serves values.
        arranged = (tensors[0] if rule.arrange is None else rule.arrange(tensors))[first : first + size]
        if kind in tiled:
            from pallas_kernels.quant_matmul.weave import weave

            weave(np.ascontiguousarray(arranged), out, kind)
        else:
            out[...] = arranged
        return out.nbytes

    jobs = [(layer, first) for layer in range(len(kinds)) for first in range(0, rows, size)]
    with ThreadPoolExecutor(threads) as pool:
        for nbytes in pool.map(lambda job: read(*job), jobs):
            task.advance(nbytes)
    return stacks, tuple(places)


def _kind(source: TensorSource, name: str) -> str:
    return source.stored_kind(name) or DENSE.get(source.dtype(name).name, "f32")


def _rows(source: TensorSource, name: str, kind: str) -> np.ndarray:
    if source.stored_kind(name) == kind and (stored := source.stored(name)) is not None:
        return stored[1]
    values = np.empty(source.shape(name), _dtype(FORMATS[kind].dtype))
    source.read_into(name, values)
    return values


def _dtype(name: str) -> np.dtype:
    return _DTYPES.get(name) or np.dtype(name)
