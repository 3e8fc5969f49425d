"""Collects the pieces of an output: white space at their borders, numbers and ids of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from llm_infer.text.output_parsing.incoming import NotACallError
from llm_infer.text.output_parsing.pieces import CallArguments, CallEnd, CallStart, Piece, ReasoningText, Text


class Writer:
    """Turns what readers find into pieces.

    White space between text, reasoning and calls belongs to the format: it comes out only where text stands on either side.

    Attributes:
        functions: name → schema of the parameters, of all that may be called; None for any.
        pieces: what has been found.
        thinking: whether reasoning goes on.
    """

    def __init__(self, functions: Mapping[str, Mapping[str, Any] | None] | None, new_id: Callable[[], str]) -> None:
        self.functions = functions
        self.pieces: list[Piece] = []
        self.thinking = False
        self._new_id = new_id
        self._ids: set[str] = set()
        self._index = -1
        self._call: tuple[str, str] | None = None  # id and name of a call that has no arguments yet
        self._running = False
        self._space: list[str] = []
        self._thought_space: list[str] = []
        self._wrote = self._thought = self._at_border = False

    def take(self) -> list[Piece]:
        """Returns the pieces since the last time; parts of one thing are put together."""
        pieces, self.pieces = self.pieces, []
        if len(pieces) < 2:
            return pieces
        return [piece for key, run in groupby(pieces, _kind) for piece in _joined(key, list(run))]

    def text(self, text: str) -> None:
        """Adds text of the answer."""
        if not (body := text.rstrip()):
            self._space.append(text)
            return
        shown = "".join([*self._space, body])
        if self._at_border and not self._wrote:
            shown = shown.lstrip()
        self._space = [text[len(body) :]]
        self._wrote, self._at_border = True, False
        self.pieces.append(Text(shown))

    def new_line(self) -> None:
        """Separates text that comes from the text before, if there is any."""
        if self._wrote:
            self._space.append("\n")

    def reasoning(self, text: str) -> None:
        """Adds text of the reasoning."""
        if not (body := text.rstrip()):
            self._thought_space.append(text)
            return
        shown = "".join([*self._thought_space, body])
        self.pieces.append(ReasoningText(shown if self._thought else shown.lstrip()))
        self._thought_space = [text[len(body) :]]
        self._thought = True

    def end_reasoning(self) -> None:
        """Notes that reasoning has ended here."""
        self._at_border, self.thinking = True, False

    def finish(self) -> None:
        """Adds the white space at the end of the answer."""
        if not self._at_border and (space := "".join(self._space)):
            self.pieces.append(Text(space))
        self._space = []

    def open_call(self, name: str, id: str | None = None) -> None:
        """Begins a call, which comes out with its first arguments.

        Raises:
            NotACallError: there is no such function.
        """
        if not name or (self.functions is not None and name not in self.functions):
            raise NotACallError
        count = len(self._ids)
        while id is not None and id in self._ids:
            name_part, colon, _ = id.rpartition(":")
            id, count = f"{name_part}:{count}" if colon else None, count + 1
        while id is None or id in self._ids:
            id = self._new_id()
        self._call = (id, name)

    def arguments(self, text: str) -> None:
        """Adds to the arguments of the call."""
        if not text:
            return
        if self._call is not None:
            self._index += 1
            self._ids.add(self._call[0])
            self.pieces.append(CallStart(self._index, *self._call))
            self._call, self._running = None, True
        self.pieces.append(CallArguments(self._index, text))

    def close_call(self) -> None:
        """Ends a call whose arguments are complete."""
        if self._call is not None:
            self.arguments("{}")
        self._end(True)

    def drop_call(self) -> bool:
        """Ends a call that went wrong, and returns whether it stays as an incomplete one: without arguments it was none."""
        self._call = None
        if not self._running:
            return False
        self._end(False)
        return True

    def _end(self, complete: bool) -> None:
        self.pieces.append(CallEnd(self._index, complete))
        self._running = False
        self._at_border = True


def _kind(piece: Piece) -> tuple[type, int]:
    return type(piece), piece.index if isinstance(piece, CallStart | CallArguments | CallEnd) else -1


def _joined(kind: tuple[type, int], run: Sequence[Piece]) -> Sequence[Piece]:
    if len(run) == 1:
        return run
    text = "".join(piece.text for piece in run if not isinstance(piece, CallStart | CallEnd))
    return [CallArguments(kind[1], text) if kind[0] is CallArguments else kind[0](text)]
