"""Reports in one line tensors that are not those a model needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LISTED = 10  # names shown for each kind of problem, as far as they fit
_CHARACTERS = 680  # ten names of one kind and a few of each other kind


def tensor_report(problems: Mapping[str, Sequence[str]]) -> str:
    """Returns the kinds of problems with their counts and first tensors, joined by semicolons; kinds without any are left out."""
    found = {kind: tensors for kind, tensors in problems.items() if tensors}
    listed = {kind: " ".join(", ".join(tensors[:_LISTED]).split()) for kind, tensors in found.items()}
    room = _CHARACTERS
    for done, kind in enumerate(
        sorted(found, key=lambda kind: len(listed[kind]))
    ):  # short lists leave room for long ones
        share = room // (len(found) - done)
        if len(listed[kind]) > share or len(found[kind]) > _LISTED:
            listed[kind] = listed[kind][:share] + " …"
        room -= len(listed[kind])
    return "; ".join(f"{kind} ({len(tensors)}): {listed[kind]}" for kind, tensors in found.items())
