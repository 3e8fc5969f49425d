"""Stop strings in a stream of text: they may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class StopStrings:
    """Passes text through until a stop string is complete; holds back what may be the beginning of one.

    All pieces that come out, taken together, are the text up to the stop string that ends first (the earlier one, then the
    longer, if several end with the same character), with the stop string itself if `include` is set.

    A stop string may hold the text of special tokens, which the text leaves out: a mark stands in place of each, a
    character that no text has, and it does not come out.

    Attributes:
        marks: id → mark, for the special tokens that stop strings name.
        found: the stop string that ended the text; None so far.
    """

    def __init__(
        self, stops: Sequence[str], *, include: bool = False, special_tokens: Mapping[str, int] | None = None
    ) -> None:
        """Starts a stream; `special_tokens`: text → id of the tokens that the text leaves out."""
        # Some vocabularies have thousands of special tokens, and most requests no stop string.
        known = (special_tokens or {}) if stops else {}
        named = [text for text in known if text and any(text in stop for stop in stops)]
        # Halves of surrogate pairs: text decoded from UTF-8 has none.
        marks = {text: chr(0xD800 + index) for index, text in enumerate(sorted(named, key=len, reverse=True))}
        self.marks = {known[text]: mark for text, mark in marks.items()}
        self._left_out = dict.fromkeys(map(ord, marks.values()))
        self._stops = {stop: stop for stop in stops}
        for stop in stops:
            marked = stop
            for text, mark in marks.items():
                marked = marked.replace(text, mark)
            self._stops[marked] = stop
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, search: bool = True) -> str:
        """Returns the text that is final now. Without `search` (from the start on) stop strings pass."""
        if self.found is not None:
            return ""
        if not self._stops or not search:
            return self._without_marks(text)
        pending = self._held + text
        matches = [
            (pending.index(stop) + len(stop), pending.index(stop), stop) for stop in self._stops if stop in pending
        ]
        if matches:
            _, start, stop = min(matches)
            self.found, self._held = self._stops[stop], ""
            return self._without_marks(pending[:start]) + (self.found if self._include else "")
        keep = max(_overlap(pending, stop) for stop in self._stops)
        self._held = pending[len(pending) - keep :]
        return self._without_marks(pending[: len(pending) - keep])

    def finish(self) -> str:
        """Ends the stream and returns what was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return self._without_marks(held)

    def _without_marks(self, text: str) -> str:
        return text.translate(self._left_out) if self._left_out else text


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
