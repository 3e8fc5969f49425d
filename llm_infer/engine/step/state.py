"""What step programs take and return beside parameters, by name. Something new that steps carry is one field here.

Donation, the cut over a mesh, the message to other hosts and the shapes for compiling ahead of time follow from the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Int, Shaped

from llm_infer.decoding.penalties import PenaltyState

Pages = Shaped[Array, "L P ..."]

PAGES = "pages"
"""The pool of pages with keys and values, of which groups of layers have theirs (`kvcache.groups`)."""

CONV = "conv"
"""The last inputs of short convolutions, a state of each to a page (`kvcache.states`)."""

Cache = Mapping[str, Pages]
"""What layers remember, by its kind."""


class StepState(NamedTuple):
    """What stays on the devices from step to step. A step is given it for good (donated) and returns the next.

    A field is None in programs that do not need it, and before the first step that does.

    Attributes:
        cache: pools by kind.
        last_ids: the last drawn id of each slot; one slot more than sequences takes what nobody reads.
        penalties: with PENALTIES, what penalties and biases read.
    """

    cache: Cache
    last_ids: Int[Array, "dp slots"]
    penalties: PenaltyState | None = None


class StepInputs(NamedTuple):
    """What the host sends with a step.

    Attributes:
        packed: the fields of `StepLayout` in one buffer.
        allowed: with MASKED, a bit for each token that each row may draw.
    """

    packed: Int[Array, "dp N"] | np.ndarray
    allowed: Int[Array, "dp R W"] | np.ndarray | None = None

    def arrays(self) -> list[Any]:
        """Returns the fields that are there, in order."""
        return [value for value in self if value is not None]

    def filled(self, arrays: list[Any]) -> StepInputs:
        """Returns inputs with the fields that are there in these, taken from the front of `arrays`."""
        return StepInputs._make(None if value is None else arrays.pop(0) for value in self)


def after(before: StepState, step: StepState) -> StepState:
    """Returns what stays: what a step returned, and what it was not given."""
    return StepState._make(old if new is None else new for old, new in zip(before, step, strict=True))
