"""Values out of NumPy, JAX, torch or pandas as Python's own, so that prompts and settings may be computed with them."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """The Python number of a scalar (an array without axes, too); anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def plain_list(value: Any) -> Any:
    """Nested lists of an array or series of any length; scalars within a list or tuple as `plain`; else as it is."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
