"""Turns values of NumPy, JAX, torch and pandas into Python's own, so that prompts and settings may be computed with them."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """Returns the Python number of a scalar (also of an array without axes); anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def plain_list(value: Any) -> Any:
    """Returns an array or series of any length as nested lists, with scalars as from `plain`; anything else as it is."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
