"""Server-sent events of a streamed answer: when each came and whether it has text, found in bytes without decoding JSON."""

from __future__ import annotations

import json
import re
import time
from typing import Any

_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content|arguments)"\s*:\s*"(?!")').search
"""Finds a text that is not empty. In a JSON string quotes are escaped, so a generated text cannot look like this."""


class Events:
    """The events of one stream. `feed` takes bytes that may be cut anywhere.

    Attributes:
        times: when events with text came, by `time.perf_counter`.
        done: whether `[DONE]` came.
        error: kind and message of what went wrong, or None.
        usage: token counts of the last event that had some.
        kept: events with text, undecoded, where they are asked for.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.times: list[float] = []
        self.done = False
        self.error: tuple[str, str] | None = None
        self.usage: dict[str, Any] = {}
        self.kept: list[bytes] | None = [] if keep else None
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Takes bytes of the body; their time is now."""
        now = time.perf_counter()
        if self._rest:
            data = self._rest + data
        if b"\r" in data:  # a lone one at the end may be half of a line end
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and b"\n" not in event:
                self._take(event, now)
            else:
                self._take_lines(event, now)

    def end(self) -> None:
        """Takes the end of the body: the last event may lack its empty line."""
        if self._rest:
            self.feed(b"\n\n")

    def _take_lines(self, event: bytes, now: float) -> None:
        """Takes an event that has comments, a name, or several lines of data."""
        data = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
        if data:
            self._take(b"data:" + b"\n".join(data), now)

    def _take(self, event: bytes, now: float) -> None:
        if _TEXT(event) and event.endswith((b"}", b"} ")):
            self.times.append(now)
            if self.kept is not None:
                self.kept.append(event)
            if b'"completion_tokens"' not in event:
                return
        payload = event[5:].strip()
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            found = json.loads(payload)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self.error = self.error or ("malformed event", _short(payload))
        elif found.get("error") or found.get("object") == "error":
            self.error = self.error or ("error in the stream", _short(message_of(found)))
        elif isinstance(usage := found.get("usage"), dict):
            self.usage = usage

    def text(self) -> str:
        """Returns the text of the kept events."""
        texts = []
        for event in self.kept or ():
            choices = json.loads(event[5:]).get("choices") or [{}]
            delta = choices[0].get("delta") or choices[0]
            texts.append(delta.get("content") or delta.get("text") or "")
        return "".join(texts)


def message_of(answer: Any) -> str:
    """Returns the words of an error's JSON body, as OpenAI's, vLLM's and FastAPI's are."""
    if not isinstance(answer, dict):
        return str(answer)
    named = (answer.get(name) for name in ("error", "message", "detail", "status"))
    error = next(filter(None, named), answer)
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _short(text: str | bytes) -> str:
    shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return " ".join(shown.split())[:200]
