"""What a training run holds from step to step, the step that changes it, and where it is kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    """

    params: Params
    optimizer: Any


Loss = Callable[[Params, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""Of all parameters and a batch: the loss, and figures to report."""

Step = Callable[[TrainState, Params, Any], tuple[TrainState, dict[str, jax.Array]]]
"""Of a state (donated), the parameters that stay, and a batch: the next state, and figures."""


def begin(
    model: LoadedModel, optimizer: optax.GradientTransformation, trainable: Callable[[str], bool] | None = None
) -> tuple[TrainState, Params]:
    """Takes a model's parameters apart into those that are trained, which are copied, and those that stay.

    Raises:
        UserError: nothing is left to train.
    """

    def learns(name: str) -> bool:
        value = model.params[name]
        plain = not isinstance(value, StoredWeights) and jnp.issubdtype(value.dtype, jnp.floating)
        return plain and (trainable is None or trainable(name))

    own = {name: jnp.copy(value) for name, value in model.params.items() if learns(name)}
    if not own:
        raise UserError("there is nothing to train: load the model with weights='dense', or choose other parameters")
    fixed = {name: value for name, value in model.params.items() if name not in own}
    return TrainState(own, optimizer.init(own)), fixed


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
        return TrainState(params, remembered), figures

    return jax.jit(step, donate_argnums=0)


class Keeper:
    """Keeps states and figures in a directory, and gives back the newest.

    Args:
        directory: where; None keeps nothing.
        every: steps between two that are kept.
        run: what makes this run another than others, by name.
        steps: of the whole run.

    Raises:
        UserError: the directory cannot be used, or what is kept there is of another run, or of a longer one.
    """

    def __init__(self, directory: str | Path | None, every: int, run: Mapping[str, Any], steps: int) -> None:
        self._every, self._manager, self._steps = every, None, steps
        self._run = {name: value if isinstance(value, int | float) else _digest(value) for name, value in run.items()}
        require_counts(checkpoint_every=every)
        if directory is not None:
            path, options = Path(directory).absolute(), ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
            if path.exists() and not path.is_dir():
                raise UserError(f"checkpoint={str(path)!r} is a file: take a directory")
            try:
                self._manager = ocp.CheckpointManager(path, options=options)
            except (OSError, ValueError) as error:
                raise UserError(f"checkpoint={str(path)!r}: {str(error)[:200]}: take a directory") from None

    def newest(self, state: TrainState, history: list[dict[str, float]]) -> TrainState:
        """Returns the newest state that is kept, or the one given; fills `history`.

        Raises:
            UserError: what is kept is of another run, or of a longer one.
        """
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return state
        where = f"{self._manager.directory}: step {step}"
        try:
            noted = self._manager.restore(step, args=ocp.args.Composite(history=ocp.args.JsonRestore()))["history"]
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{where} is nothing that a run has kept ({str(error)[:120]}): take another directory"
            ) from None
        if others := [name for name, value in self._run.items() if noted.get("run", {}).get(name) != value]:
            raise UserError(
                f"{where} is of a run with other {', '.join(others)}: take another directory, or the same settings"
            )
        if step > self._steps:
            raise UserError(f"{where} is past steps={self._steps}: raise it, or take another directory")
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
        try:
            kept = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))["state"]
        except (ValueError, KeyError, FileNotFoundError):
            raise UserError(
                f"{where} is not of this run: it has other parameters, or another optimizer; take another directory"
            ) from None
        history[:] = noted["steps"]
        return TrainState(**kept)

    def keep(self, state: TrainState, history: list[dict[str, float]]) -> None:
        """Keeps a state if it is time, or the last one."""
        done = len(history)
        if self._manager is None or (done % self._every and done < self._steps):
            return
        noted = {"run": self._run, "steps": list(history)}  # a copy: it is written while the run goes on
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), history=ocp.args.JsonSave(noted))
        self._manager.save(done, args=items)

    def close(self) -> None:
        """Waits for what is being written."""
        if self._manager is not None:
            self._manager.close()


def require_counts(**counts: Any) -> None:
    """Refuses settings that are no whole numbers from 1.

    Raises:
        UserError: it names the first of them.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r:.40}: expected a whole number from 1")


def require_finite(figures: Mapping[str, float], step: int) -> None:
    """Ends a run whose numbers are lost.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(figures[name]):
            raise UserError(f"step {step}: {name}={figures[name]}: lower the learning rate, or clip gradients")


def _digest(value: Any) -> str:
    """Returns a checksum of what a setting says."""
    data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]
