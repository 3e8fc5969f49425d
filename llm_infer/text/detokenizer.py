"""Incremental detokenisation: text comes out as soon as it is final, while tokens come in one by one."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from llm_infer.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes in UTF-8


class IncrementalDetokenizer:
    """Turns a stream of token ids into text: that of prompt and stream together by `tokenizer.decode`, less the prompt's.

    A token may end inside a UTF-8 character, so bytes wait until their character is complete or can no longer become
    one; a character that the prompt began and the stream completes is the stream's. The space that SentencePiece puts
    before a text belongs to the prompt, if it has any text. Work is proportional to the bytes of the new tokens,
    whatever has come before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = True,
        marks: Mapping[int, str] | None = None,
        keep_first_space: bool = False,
    ) -> None:
        """Starts a stream.

        Args:
            tokenizer: knows the bytes of each token.
            prompt: the ids before the stream.
            skip_special_tokens: leave markers such as `<|im_end|>` out of the text.
            marks: text to put in the place of special tokens that are left out.
            keep_first_space: keep the first space also where the prompt has no text.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._marks = dict(marks or {}) if skip_special_tokens else {}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last = list(islice(filter(None, map(self._bytes, reversed(prompt))), _LONGEST_CHARACTER))
        self._decoder.decode(b"".join(reversed(last)))
        self._strip_space = tokenizer.strips_leading_space and not last and not keep_first_space

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that the new `ids` complete; empty while a character is unfinished."""
        pieces = []
        for token in ids:
            if token in self._marks:
                pieces.append(self._marks[token])
            elif data := self._bytes(token):
                pieces.append(self._decoder.decode(data.removeprefix(b" ") if self._strip_space else data))
                self._strip_space = False
        return "".join(pieces)

    def finish(self) -> str:
        """Ends the stream and returns what is left of an unfinished character, as U+FFFD; usually empty."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        skipped = self._skip_special and self._tokenizer.is_special(token)
        return b"" if skipped else self._tokenizer.token_bytes(token)
