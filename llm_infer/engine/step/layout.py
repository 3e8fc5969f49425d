"""Layout of the one int32 buffer that carries everything a step needs from the host to the device.

One transfer of one array costs a fraction of what two dozen small ones cost, and the jitted step has few arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from llm_infer.engine.step.row_fields import ROW_FIELDS
from pallas_kernels.paged_attention.plan import PlanShape, plan_fields

FLOATS = frozenset(field.name for field in ROW_FIELDS if field.dtype is np.float32)
"""Fields whose 32 bits are a float."""

STOP_IDS = 8
"""Ids that end a row of several steps on the device."""


@dataclass(frozen=True)
class StepLayout:
    """Where each field of a step lies in the buffer, for one token bucket.

    Attributes:
        plan: sizes of the attention plan (T, S, B and rows of a work item).
        draws: rows R of logits: one per sequence, behind them those of proposed tokens; 0 stands for one per sequence.
        steps: tokens that are drawn one after the other at most.
        groups: groups of layers with block tables of their own; `more_tables` has those after the first.
        states: sequences have states, and the fields of `causal_conv.StateRows` for them.
    """

    plan: PlanShape
    draws: int = 0
    steps: int = 1
    groups: int = 1
    states: bool = False

    @property
    def num_draws(self) -> int:
        """R, rows of logits and of draws."""
        return self.draws or self.plan.sequences

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, in the order of the buffer.

        `feeds` marks tokens whose id is still on the device, in slot `feed_slot`; `targets` are the tokens that follow in
        a prompt (for PROMPT_LOGPROBS); `logits_row` is the token row whose hidden state a sequence samples from; `slot` is
        where its drawn id is kept (the last slot takes what nobody reads); `position` is the place of the token that
        it draws. With several steps, `num_steps` is how many tokens to draw for a row, `max_steps` how many for any
        row of any shard, and `stop_ids` end it, padded with -1 (ids that do not fit only end it later, on the host).
        """
        tokens, rows = (self.plan.tokens,), (self.num_draws,)
        per_token = dict.fromkeys(("token_ids", "positions", "feeds", "feed_slot", "targets"), tokens)
        per_row = dict.fromkeys(
            ("logits_row", "slot", "position", *(field.name for field in ROW_FIELDS)),
            rows,
        )
        copies = dict.fromkeys(("copy_from", "copy_to"), (self.num_draws * self.groups,))
        fields = {**per_token, **per_row, **copies, "num_copies": (1,), **plan_fields(self.plan)}
        if self.groups > 1:
            fields |= {"more_tables": (self.groups - 1, self.plan.sequences, self.plan.pages_per_seq)}
        if self.states:
            fields |= dict.fromkeys(("state_from", "state_to", "state_count"), (self.plan.sequences,))
        if self.steps > 1:
            fields |= {"num_steps": rows, "max_steps": (1,), "stop_ids": (*rows, STOP_IDS)}
        return fields

    def _slices(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        start = 0
        for name, shape in self.fields.items():
            size = math.prod(shape)
            yield name, shape, start, start + size
            start += size

    @property
    def size(self) -> int:
        """Length of the buffer in int32 words."""
        return sum(math.prod(shape) for shape in self.fields.values())

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Returns writable host views of the fields in `buffer` [size] int32."""
        result = {name: buffer[a:b].reshape(shape) for name, shape, a, b in self._slices()}
        return {name: view.view(np.float32) if name in FLOATS else view for name, view in result.items()}

    def unpack(self, packed: Int[Array, " N"]) -> dict[str, jax.Array]:
        """Slices the fields out of the buffer on the device."""
        result = {name: packed[a:b].reshape(shape) for name, shape, a, b in self._slices()}
        return {
            name: lax.bitcast_convert_type(value, jnp.float32) if name in FLOATS else value
            for name, value in result.items()
        }


def token_buckets(max_tokens: int, smallest: int = 2) -> tuple[int, ...]:
    """Returns the token counts that have a step program: powers of two from `smallest` up to the step's token limit."""
    sizes = [smallest]
    while sizes[-1] < max_tokens:
        sizes.append(min(2 * sizes[-1], max(smallest, max_tokens)))
    return tuple(sizes)
