"""Incremental detokenisation: text as soon as it is final, while tokens come in one by one."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from llm_infer.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns a stream of token ids into text; all pieces together equal `tokenizer.decode` of all ids.

    A token may end inside a UTF-8 character, so bytes wait until their character is complete or can no longer become
    one. Work is proportional to the bytes of the new tokens, whatever came before.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Starts an empty stream; `skip_special_tokens` leaves markers such as `<|im_end|>` out of the text."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_leading_space  # until the first byte has been seen

    def push(self, ids: Iterable[int]) -> str:
        """Text that the new `ids` complete; empty while a character is unfinished."""
        tokenizer = self._tokenizer
        data = b"".join(tokenizer.token_bytes(i) for i in ids if not (self._skip_special and tokenizer.is_special(i)))
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Ends the stream: what was left of an unfinished character, as U+FFFD; usually empty."""
        return self._decoder.decode(b"", final=True)
