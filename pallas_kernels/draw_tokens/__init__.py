"""Draws one token for each row of logits, within the row's limits, by one uniform number. Contract and entry.

Axis letters: S rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import case_of, expect
from pallas_kernels.draw_tokens.limits import Limits
from pallas_kernels.draw_tokens.xla import limited

__all__ = ["Limits", "draw_tokens", "limited"]


def draw_tokens(
    logits: jax.Array, limits: Limits, uniform: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Returns the next token of each row.

    With temperature 0, or where the largest logit is inf, it is the first of the largest. Otherwise the logits less their largest
    are divided by the temperature; top-k, then top-p, min-p and typical-p of what is left keep some tokens (ties with
    the last one are kept), and the uniform number says where in their cumulative distribution the token lies. The distribution
    runs over the kept tokens in descending order where they are fewer than `limits.CANDIDATES`, else in the order of the
    vocabulary. A row's token depends on nothing but the row itself.

    Args:
        logits: Float[Array, "S V"]; -inf for a token that must not be drawn.
        limits: each Array of shape [S], integers for top-k and floats for the others; see `Limits`.
        uniform: Float[Array, " S"], in [0, 1).
        implementation: name of the implementation to use, see `pallas_kernels.dispatch`.

    Returns:
        Int32[Array, " S"].

    Raises:
        ValueError: at trace time, for shapes or dtypes other than these.
    """
    expect(logits.ndim == 2 and jnp.issubdtype(logits.dtype, jnp.floating), "logits", "floats of shape [S, V]", logits)
    rows = logits.shape[0]
    for name, array in {**limits._asdict(), "uniform": uniform}.items():
        kind = jnp.integer if name == "top_k" else jnp.floating
        fits = array.shape == (rows,) and jnp.issubdtype(array.dtype, kind)
        expect(fits, name, f"{'integers' if name == 'top_k' else 'floats'} of shape [S={rows}]", array)
    kinds = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in Limits._fields}
    limits = Limits(**{name: array.astype(kinds[name]) for name, array in limits._asdict().items()})
    case = case_of({"logits": logits})
    return dispatch.pick("draw_tokens", case, implementation)(logits, limits, uniform.astype(jnp.float32))
