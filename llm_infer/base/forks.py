"""Tells a child of `os.fork` at once that it cannot compute: JAX's threads, and our own, stay with the parent."""

from __future__ import annotations

import os

from llm_infer.base.errors import UserError

_in_use = False
"""Whether this process has begun to compute."""

_lost = False
"""Whether this process is the child of one that had begun to compute."""


def _after_fork() -> None:
    global _lost
    _lost = _in_use


os.register_at_fork(after_in_child=_after_fork)


def is_lost_child() -> bool:
    """Checks whether the process was forked from one that computed, so that waiting for a thread or a lock would not end."""
    return _lost


def refuse_lost_child() -> None:
    """Raises an error in a child of a process that has computed. Must be called before a process computes or takes a lock.

    Raises:
        UserError: a parent of this process had called this before it forked.
    """
    global _in_use
    if _lost:
        raise UserError(
            "this process is a child of os.fork, whose parent has used JAX: its threads stay with the parent, so computing "
            "here would hang; start processes with multiprocessing.get_context('spawn') and make the LLM inside them"
        )
    _in_use = True
