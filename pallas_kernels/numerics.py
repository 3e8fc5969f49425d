"""Whether the code being traced must give every row the same bits in any company: a setting that jit's caches know of."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

_invariant = jax.make_user_context(False)


def numerics(name: str) -> AbstractContextManager[None]:
    """Has what is traced inside take what is fastest ("auto"), or only sums whose order does not depend on the number of rows
    ("invariant")."""
    return _invariant(name == "invariant")


def is_invariant() -> bool:
    """Tells whether a row's bits must not depend on the other rows."""
    return bool(_invariant.value)
