"""Keeps texts that users write from becoming control tokens.

A chat template writes control tokens such as `<|im_end|>` around contents. The same text within a content is only text:
otherwise users could end their own turn and write one of the system's. Contents are marked where they hold such a text,
the marks are found again in the template's result, and there the text is encoded as plain text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer


class ControlTokens:
    """Control tokens of a tokenizer, their texts in contents, and texts encoded with some of them as plain text."""

    def __init__(
        self, backend: Tokenizer, special_tokens: Mapping[str, int], as_text: Callable[[int], list[int]]
    ) -> None:
        """Takes `special_tokens`, text → id of the control tokens, all added tokens of `backend`; `as_text` spells one."""
        self._as_text = as_text
        self._backend = backend
        self._ids = {text: i for text, i in special_tokens.items() if text}
        self._added = {token.content: token for token in backend.get_added_tokens_decoder().values() if token.content}
        # Nobody can guess the mark, so no content holds it. Its letters are changed by no filter of a template.
        self._mark = "".join(chr(0xE000 + secrets.randbelow(0xF900 - 0xE000)) for _ in range(5))
        self._within = re.compile(_any_of(self._ids))
        self._first = re.compile(f"(?=(?:{_any_of(self._ids)}))(.)", re.DOTALL)

    def within(self, value: Any) -> bool:
        """Checks whether a text in `value`, plain values of any depth, holds the text of a control token."""
        if isinstance(value, str):
            return bool(self._ids) and self._within.search(value) is not None
        if isinstance(value, Mapping):
            return any(self.within(key) or self.within(item) for key, item in value.items())
        return isinstance(value, list | tuple) and any(map(self.within, value))

    def marked(self, value: Any) -> Any:
        """Returns `value` with a mark in each text of a control token, behind its first character."""
        if isinstance(value, str):
            return self._first.sub(lambda found: found[1] + self._mark, value) if self._ids else value
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(item) for key, item in value.items()}
        return [self.marked(item) for item in value] if isinstance(value, list | tuple) else value

    def unmarked(self, text: str) -> tuple[str, set[int]]:
        """Returns the text without marks, and the positions in it of the characters that stood before a mark."""
        pieces = text.split(self._mark)
        positions, end = set(), 0
        for piece in pieces[:-1]:
            end += len(piece)
            positions.add(end - 1)
        return "".join(pieces), positions

    def encode(self, text: str, literal: Collection[int]) -> list[int]:
        """Returns the ids of `text`, in which no control token begins at a position in `literal`; nothing is added around it."""
        backend, real = self._with_stand_ins
        pieces, done, at = [], 0, 0
        while found := self._any_added.search(text, at):
            at = found.start() + 1
            if found.start() not in literal:
                at = found.end()
                if found[0] in self._ids:
                    pieces += [text[done : found.start()], self._mark]
                    done = found.start()
        pieces.append(text[done:])
        ids = backend.encode("".join(pieces), add_special_tokens=False).ids
        return [one for i in ids for one in ([real[i]] if i in real else self._as_text(i))]

    @cached_property
    def _any_added(self) -> re.Pattern[str]:
        return re.compile(_any_of(self._added))

    @cached_property
    def _with_stand_ins(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy that takes texts of control tokens for text and marked ones for the tokens, and its ids → the real ones.

        The marked text is an added token, so everything around it is encoded as around the control token itself.
        """
        copy = Tokenizer.from_str(self._backend.to_str())
        copy.add_special_tokens(
            [AddedToken(text, normalized=False) for text in self._ids]
        )  # all tokens that count as control tokens here
        copy.encode_special_tokens = True
        copy.add_tokens([self._stand_in(text) for text in self._ids])
        return copy, {copy.token_to_id(self._mark + text) or 0: i for text, i in self._ids.items()}

    def _stand_in(self, text: str) -> AddedToken:
        token = self._added[text]
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        return AddedToken(self._mark + text, normalized=False, special=False, **flags)


def _any_of(texts: Iterable[str]) -> str:
    """Returns the pattern of any of these texts, the longest where several begin."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
