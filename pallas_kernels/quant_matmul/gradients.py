"""Gradients of quantised matmul, the same for every implementation: those of the exact product with dequantised weights.

Between the passes nothing is kept but the call's arguments, so a loop over layers copies no weights. The choice among
stacks lies within what is differentiated here: before jax 0.12 the gradient of `lax.switch` copies every branch's blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.formats import FORMATS
from pallas_kernels.quant_matmul.inputs import Norm, prepared
from pallas_kernels.quant_matmul.reference import layer_weights


class Call(NamedTuple):
    """What is static in a product with one stack: the function that computes it, and its settings; see `quant_matmul`."""

    run: Callable[..., jax.Array]
    kind: str
    precision: str
    tiled: bool

    @property
    def is_dense(self) -> bool:
        """Whether the blocks are plain numbers, which have gradients of their own."""
        return FORMATS[self.kind].dtype != "uint8"


class Operands(NamedTuple):
    """The arrays of a call: those of `quant_matmul`, with several stacks of blocks.

    `stack` is the number of the one to use, None for the only one. What is saved for the backward pass may lack x.
    """

    x: jax.Array | None
    stacks: tuple[jax.Array, ...]
    stack: jax.Array | None
    layer: jax.Array
    gate: jax.Array | None
    norm: Norm | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(calls: tuple[Call, ...], operands: Operands) -> jax.Array:
    """Multiplies with one of the stacks, each with its call; returns Float[Array, "M N"]."""
    x, stacks, stack, layer, gate, norm = operands

    def branch(call: Call, blocks: jax.Array, *rest: Any) -> jax.Array:
        return call.run(x, blocks, *rest, kind=call.kind, precision=call.precision, tiled=call.tiled)

    return _switch([partial(branch, *each) for each in zip(calls, stacks, strict=True)], stack, layer, gate, norm)


def _forward(calls: tuple[Call, ...], operands: Operands) -> tuple[jax.Array, Operands]:
    needs_x = any(call.is_dense for call in calls) or operands.gate is not None or operands.norm is not None
    return differentiable(calls, operands), operands if needs_x else operands._replace(x=None)


def _backward(calls: tuple[Call, ...], saved: Operands, change: jax.Array) -> tuple[Operands]:
    """Returns the cotangents of the operands, None for integers; `change` [M, N] is that of the result.

    Only the weights of the call's layer are dequantised.
    """
    x, stacks, stack, layer, gate, norm = saved
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def to_inputs(call: Call, blocks: jax.Array, change: jax.Array, layer: jax.Array) -> jax.Array:
        return product("mn,nk->mk", change, layer_weights(blocks, layer, call.kind, call.tiled))

    branches = [partial(to_inputs, *each) for each in zip(calls, stacks, strict=True)]
    to_x, to_gate, to_norm = _switch(branches, stack, change, layer), None, None
    to_stacks: list[Any] = [None] * len(stacks)
    if x is not None:
        inputs, pull_back = jax.vjp(prepared, x, gate, norm)
        to_x, to_gate, to_norm = pull_back(to_x)
        for number, (call, blocks) in enumerate(zip(calls, stacks, strict=True)):
            if call.is_dense:
                own = product("mn,mk->nk", change, inputs).astype(blocks.dtype)
                own = own if stack is None else jnp.where(stack == number, own, 0)
                to_stacks[number] = lax.dynamic_update_index_in_dim(jnp.zeros_like(blocks), own, layer, 0)
    return (Operands(to_x, tuple(to_stacks), None, None, to_gate, to_norm),)  # type: ignore[arg-type]


def _switch(branches: list[Callable[..., jax.Array]], number: jax.Array | None, *operands: Any) -> jax.Array:
    """Calls the branch of this number, the only one for None."""
    return branches[0](*operands) if number is None else lax.switch(number, branches, *operands)


differentiable.defvjp(_forward, _backward)
