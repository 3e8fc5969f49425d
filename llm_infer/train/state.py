"""What a training run holds from step to step, the step that changes it, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from llm_infer.base.errors import UserError
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import Params
from llm_infer.quant import StoredWeights


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        params: those that are trained; others stay with the model.
        optimizer: what the optimizer remembers.
        step: Int32[], steps done.
    """

    params: Params
    optimizer: Any
    step: jax.Array


Loss = Callable[[Params, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""Of all parameters and a batch: the loss, and figures to report."""

Step = Callable[[TrainState, Params, Any], tuple[TrainState, dict[str, jax.Array]]]
"""Of a state (donated), the parameters that stay, and a batch: the next state, and figures."""


def begin(
    model: LoadedModel, optimizer: optax.GradientTransformation, trainable: Callable[[str], bool] | None = None
) -> tuple[TrainState, Params]:
    """Takes a model's parameters apart into those that are trained, which are copied, and those that stay.

    Raises:
        UserError: nothing is left to train, or the mesh holds copies of KV heads, which would drift apart.
    """
    if model.config.shards.kv_copies > 1:
        raise UserError(
            f"the mesh cuts heads over {model.config.shards.devices} devices, more than there are KV heads: their copies would "
            "drift apart in training; take a mesh with fewer devices for 'tp'"
        )

    def learns(name: str) -> bool:
        value = model.params[name]
        plain = not isinstance(value, StoredWeights) and jnp.issubdtype(value.dtype, jnp.floating)
        return plain and (trainable is None or trainable(name))

    own = {name: jnp.copy(value) for name, value in model.params.items() if learns(name)}
    if not own:
        raise UserError("there is nothing to train: load the model with weights='dense', or choose other parameters")
    fixed = {name: value for name, value in model.params.items() if name not in own}
    return TrainState(own, optimizer.init(own), jnp.int32(0)), fixed


def make_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """Makes the jitted step of a loss; its state is donated."""

    def step(state: TrainState, fixed: Params, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        def of(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss({**fixed, **params}, batch)

        (value, figures), gradients = jax.value_and_grad(of, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # which optax counts on
            changes, remembered = optimizer.update(gradients, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, changes)
        squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(gradients)]
        figures = {"loss": value, "gradient_norm": jnp.sqrt(sum(squares, jnp.float32(0))), **figures}
        return TrainState(params, remembered, state.step + 1), figures

    return jax.jit(step, donate_argnums=0)


class Keeper:
    """Keeps states and figures in a directory, and gives back the newest.

    Args:
        directory: where; None keeps nothing.
        every: steps between two that are kept.
    """

    def __init__(self, directory: str | Path | None, every: int) -> None:
        self._every, self._manager = every, None
        if directory is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
            self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def newest(self, state: TrainState, history: list[dict[str, float]]) -> TrainState:
        """Returns the newest state that is kept, or the one given; fills `history`.

        Raises:
            UserError: what is kept is of another run.
        """
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return state
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), history=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=arguments)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{self._manager.directory}: step {step} is not of this run ({str(error)[:200]}): take another directory"
            ) from None
        history[:] = found["history"]["steps"]
        return TrainState(**found["state"])

    def keep(self, state: TrainState, history: list[dict[str, float]], *, last: bool) -> None:
        """Keeps a state if it is time, or the last one."""
        step = int(state.step)
        if self._manager is None or (step % self._every and not last) or step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), history=ocp.args.JsonSave({"steps": history})
        )
        self._manager.save(step, args=items)

    def close(self) -> None:
        """Waits for what is being written."""
        if self._manager is not None:
            self._manager.close()
