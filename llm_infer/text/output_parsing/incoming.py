"""Text that arrives bit by bit, for readers written as if all of it were there: where it is not, they wait (`yield`).

A reader is a generator that yields where it needs more text. What a reader decides depends only on the text so far, never
on how it was cut into bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""What a reader is: it waits for text, and returns a T."""

SPACE = re.compile(r"[ \t\r\n]+")


class NotACallError(Exception):
    """What was read is not what the format prescribes."""


class Incoming:
    """The text that has arrived and has not been read.

    Attributes:
        ended: whether no more text will come.
    """

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._record: list[str] | None = None
        self.ended = False

    def feed(self, text: str) -> None:
        """Adds text at the end."""
        self._text, self._at = self._text[self._at :] + text, 0

    def start_record(self) -> None:
        """Starts to remember what is read."""
        self._record = []

    def mark(self) -> int:
        """Returns a place in the record, for `since`."""
        return len(self._record or [])

    def since(self, mark: int) -> str:
        """Returns the text that was read since then, and goes on with the record."""
        return "".join((self._record or [])[mark:])

    def recorded(self) -> str:
        """Ends a record and returns the text that was read since its start."""
        record, self._record = self._record or [], None
        return "".join(record)

    def peek(self, count: int = 1) -> Reading[str]:
        """Returns the next `count` characters without reading them; fewer only if the text ends before."""
        while len(self._text) - self._at < count and not self.ended:
            yield
        return self._text[self._at : self._at + count]

    def take(self, count: int) -> str:
        """Reads characters that are there."""
        return self._read(self._at + count)

    def run(self, pattern: re.Pattern[str]) -> str:
        """Reads what matches here, of what is there; empty if nothing does. Waits for nothing."""
        found = pattern.match(self._text, self._at)
        return self._read(found.end()) if found else ""

    def skip_space(self) -> Reading[str]:
        """Reads white space and returns it; then the next character is there, or the text has ended."""
        parts: list[str] = []
        while (yield from self.peek()) and (part := self.run(SPACE)):
            parts.append(part)
        return "".join(parts)

    def comes(self, literal: str) -> Reading[bool]:
        """Checks whether `literal` comes next, without reading it; waits only while it may."""
        for count in range(1, len(literal) + 1):
            if (yield from self.peek(count)) != literal[:count]:
                return False
        return True

    def skip(self, literal: str) -> Reading[bool]:
        """Reads `literal` if it comes next; otherwise nothing."""
        if not (yield from self.comes(literal)):
            return False
        self.take(len(literal))
        return True

    def expect(self, literal: str) -> Reading[None]:
        """Reads `literal`.

        Raises:
            NotACallError: something else is there.
        """
        if not (yield from self.skip(literal)):
            raise NotACallError

    def rest(self, emit: Callable[[str], object]) -> Reading[None]:
        """Reads all that comes and gives it to `emit`."""
        while True:
            if self._at < len(self._text):
                emit(self._read(len(self._text)))
            if self.ended:
                return
            yield

    def until(self, ends: tuple[str, ...], emit: Callable[[str], object]) -> Reading[str]:
        """Reads up to the first of `ends`, and it; gives the text before it to `emit` as soon as it is sure.

        Returns:
            the end that was found (of those at one place, the first of `ends`), or "" if the text ended before.
        """
        search = _pattern(ends)
        longest = max(map(len, ends))
        while True:
            found = search.search(self._text, self._at)
            sure = found.start() if found else len(self._text) if self.ended else self._sure(ends, longest)
            if found and not self.ended and len(self._text) - sure < longest and self._may_grow(ends, found):
                found = None  # a longer end that goes first may still come here
            if sure > self._at:
                emit(self._read(sure))
            if found:
                self._read(self._at + len(found[0]))
                return found[0]
            if self.ended:
                return ""
            yield

    def _sure(self, ends: tuple[str, ...], longest: int) -> int:
        """Returns where the longest part at the end of the text begins that may be the beginning of one of `ends`."""
        size = len(self._text)
        firsts = {end[0] for end in ends}
        for start in range(max(self._at, size - longest + 1), size):
            if self._text[start] in firsts and any(end.startswith(self._text[start:]) for end in ends):
                return start
        return size

    def _may_grow(self, ends: tuple[str, ...], found: re.Match[str]) -> bool:
        tail = self._text[found.start() :]
        return any(end.startswith(tail) and end != tail for end in ends[: ends.index(found[0])])

    def _read(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        if self._record is not None:
            self._record.append(text)
        return text


@lru_cache(maxsize=256)
def _pattern(ends: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, ends)))
