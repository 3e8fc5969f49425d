"""Takes a model's output apart while it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llm_infer.text.output_parsing.call_readers import CallReader
from llm_infer.text.output_parsing.harmony import read_harmony
from llm_infer.text.output_parsing.incoming import Incoming, Reading
from llm_infer.text.output_parsing.pieces import CallEnd, Piece, Text
from llm_infer.text.output_parsing.reasoning import ReasoningFormat
from llm_infer.text.output_parsing.rules import Harmony, ToolFormat
from llm_infer.text.output_parsing.writer import Writer

Functions = Mapping[str, Mapping[str, Any] | None]
"""Name → JSON schema of the parameters, None for a function without."""


class OutputScanner:
    """Finds reasoning, text and tool calls in an output that arrives bit by bit.

    The pieces, put together, do not depend on the bits. Text that may be the beginning of a marker waits. What is no complete
    call is text, unless parts of its arguments are out: such a call ends with `complete=False`.

    Args:
        tools: how the model writes calls; None leaves them in the text.
        reasoning: how it writes its reasoning; None leaves it in the text.
        in_reasoning: whether the output begins within the reasoning (`reasoning.starts_in_reasoning`).
        parallel: whether there may be several calls; if not, the output ends with the first complete one.
        functions: all functions that may be called; calls of others are text. None allows any.
        new_id: makes the id of a call; by default as the format wants it.

    Attributes:
        ended: whether the output is to end here: what is pushed from now on is dropped.
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        reasoning: ReasoningFormat | None = None,
        *,
        in_reasoning: bool = False,
        parallel: bool = True,
        functions: Functions | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._tools, self._reasoning, self._in_reasoning = tools, reasoning, in_reasoning
        self._source = Incoming()
        self._writer = Writer(functions, new_id or (tools.new_id if tools else str))
        self._plain = tools is None and reasoning is None
        self._writer.thinking = in_reasoning and reasoning is not None
        self._program = self._read()
        self._done = False
        self._parallel = parallel
        self.ended = False

    @property
    def thinking(self) -> bool:
        """Whether what comes next is, so far, part of the reasoning."""
        return self._writer.thinking

    def push(self, text: str) -> list[Piece]:
        """Returns the pieces that more text of the output makes sure."""
        if self._plain:
            return [Text(text)] if text else []
        self._source.feed(text)
        return self._go_on()

    def finish(self) -> list[Piece]:
        """Ends the output and returns the rest of its pieces."""
        if self._plain:
            return []
        self._source.ended = True
        pieces = self._go_on()
        self._writer.finish()
        return pieces + self._up_to_end(self._writer.take())

    def _go_on(self) -> list[Piece]:
        if not self._done:
            self._done = next(self._program, True) is True
        return self._up_to_end(self._writer.take())

    def _up_to_end(self, pieces: list[Piece]) -> list[Piece]:
        if self._parallel:
            return pieces
        kept: list[Piece] = []
        for piece in pieces:
            if self.ended:
                break
            kept.append(piece)
            self.ended = isinstance(piece, CallEnd) and piece.complete
        return kept

    def _read(self) -> Reading[None]:
        source, writer, tools = self._source, self._writer, self._tools
        if (tools and isinstance(tools.rule, Harmony)) or (self._reasoning and not self._reasoning.start):
            yield from read_harmony(source, writer, calls=tools is not None)
            return
        if self._reasoning:
            yield from self._read_reasoning(self._reasoning)
        if tools is None:
            yield from source.rest(writer.text)
            return
        reader = CallReader(source, writer, tools)
        if tools.bare:
            space = yield from source.skip_space()
            writer.text(space)
            if not (tools.start and (yield from source.skip(tools.start))):
                if (yield from source.peek()) in ("{", "["):
                    yield from reader.read_section("")
            else:
                yield from reader.read_section(tools.start)
        if not tools.start:
            yield from source.rest(writer.text)
            return
        while found := (yield from source.until((tools.start,), writer.text)):
            yield from reader.read_section(found)

    def _read_reasoning(self, reasoning: ReasoningFormat) -> Reading[None]:
        source, writer = self._source, self._writer
        space = yield from source.skip_space()
        if not (yield from source.skip(reasoning.start)) and not self._in_reasoning:
            writer.text(space)
            return
        writer.thinking = True
        yield from source.until((reasoning.end,), writer.reasoning)
        writer.end_reasoning()
