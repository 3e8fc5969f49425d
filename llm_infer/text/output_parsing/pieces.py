"""The pieces that a model's output is taken apart into, in the order in which it wrote them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """Thoughts before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """The answer that the user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of call number `index` of a function."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of a call's arguments; all parts together are the text of a JSON object if the call is complete."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The end of a call; it is not `complete` if the output broke off, or went wrong, within the arguments."""

    index: int
    complete: bool


Piece = ReasoningText | Text | CallStart | CallArguments | CallEnd
