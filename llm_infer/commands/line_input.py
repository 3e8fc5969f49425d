"""Lines that somebody types: with editing and a history where Python has readline, several at once where they ask for it."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from llm_infer.base.environment import cache_dir
from llm_infer.base.errors import UserError

QUOTES = '"""'
_KEPT_LINES = 1000


class LineInput:
    """Reads texts from standard input. On a terminal it prompts, and keeps what was typed for the next time."""

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()
        self._readline: Any = None
        self._history = cache_dir() / "chat_history"

    def __enter__(self) -> LineInput:
        if self._terminal:
            with suppress(ImportError, OSError):  # no readline here, or no history yet
                import readline

                self._readline = readline
                readline.set_history_length(_KEPT_LINES)
                readline.read_history_file(self._history)
        return self

    def __exit__(self, *_: object) -> None:
        if self._readline is not None:
            with suppress(OSError):  # a history that cannot be kept is no reason to fail
                self._history.parent.mkdir(parents=True, exist_ok=True)
                self._readline.write_history_file(self._history)

    def read(self) -> str | None:
        r"""Returns the next text, or None at the end of the input.

        A line that begins with three quotation marks begins a text that ends at the next three; one that ends in a
        backslash goes on in the next.
        """
        while True:
            try:
                return self._text()
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)

    def _text(self) -> str:
        line = self._line("> ")
        if line.lstrip().startswith(QUOTES):
            lines = [line.lstrip().removeprefix(QUOTES)]
            while QUOTES not in lines[-1]:
                lines.append(self._line("... "))
            lines[-1] = lines[-1].partition(QUOTES)[0]
            return "\n".join(lines)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line("... "))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        try:
            return input(prompt if self._terminal else "")
        except UnicodeDecodeError as error:
            raise UserError(f"what was typed is not UTF-8 text: {error.reason} at byte {error.start}") from None
