"""Stop strings in a stream of text: they may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through until a stop string is complete; holds back what may be the beginning of one.

    All pieces that come out together are the text up to the stop string that ends first (the earlier in the text, then the
    longer, if several end with the same character), with the string itself if `include`.

    Attributes:
        found: the stop string that ended the text; None so far.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, search: bool = True) -> str:
        """Text that is final now. Without `search` (from the start on) stop strings pass."""
        if self.found is not None:
            return ""
        if not self._stops or not search:
            return text
        pending = self._held + text
        matches = [
            (pending.index(stop) + len(stop), pending.index(stop), stop) for stop in self._stops if stop in pending
        ]
        if matches:
            end, start, self.found = min(matches)
            self._held = ""
            return pending[: end if self._include else start]
        keep = max(_overlap(pending, stop) for stop in self._stops)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """Ends the stream: what was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
