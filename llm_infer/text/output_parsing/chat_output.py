"""Pieces of an output as the chat endpoint of OpenAI shows them: a message, or deltas of a stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llm_infer.text.output_parsing.pieces import CallArguments, CallEnd, CallStart, Piece, ReasoningText, Text


class ChatOutput:
    """Collects the pieces of one choice."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []
        self._complete = 0
        self._cut = self._ends_with_call = False

    def push(self, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        """Adds pieces and returns their deltas.

        Of a call, the first delta has index, id, type and name, the others have index and arguments: clients join the texts of
        deltas. Reasoning goes by both names that clients know.
        """
        deltas = []
        for piece in pieces:
            self._ends_with_call = isinstance(piece, CallEnd)
            match piece:
                case Text(text):
                    self._text.append(text)
                    deltas.append({"content": text})
                case ReasoningText(text):
                    self._reasoning.append(text)
                    deltas.append({"reasoning": text, "reasoning_content": text})
                case CallStart(index, id, name):
                    self._calls.append((id, name, []))
                    deltas.append({"tool_calls": [{"index": index, **_call(id, name, "")}]})
                case CallArguments(index, text):
                    self._calls[index][2].append(text)
                    deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
                case CallEnd(complete=complete):
                    self._complete += complete
                    self._cut |= not complete
        return deltas

    def message(self) -> dict[str, Any]:
        """Returns the whole message; `content` is None if there are calls and no text."""
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if self._calls else ""),
            "refusal": None,
        }
        if reasoning:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if self._calls:
            message["tool_calls"] = [_call(id, name, "".join(parts)) for id, name, parts in self._calls]
        return message

    def finish_reason(self, reason: str) -> str:
        """Returns why the choice ended, given why the engine ended the output.

        It is "tool_calls" if there are complete calls. It is "length" if a call was cut, or the output after the last call.
        """
        if reason not in ("stop", "length"):
            return reason
        if self._cut or (reason == "length" and not self._ends_with_call):
            return "length"
        return "tool_calls" if self._complete else reason


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
