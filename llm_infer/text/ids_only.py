"""A stand-in for the tokenizer of a model that is used without one: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import tokenizers

from llm_infer.base.errors import RequestError
from llm_infer.text.tokenizer import Tokenizer


class IdsOnly(Tokenizer):
    """Knows how many ids there are and which end a sequence; no id has a text."""

    has_text = False

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int] = ()) -> None:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={}, merges=[]))
        backend.decoder = tokenizers.decoders.ByteLevel()
        super().__init__(backend, vocab_size=vocab_size, eos_token_ids=eos_token_ids)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True, begins: bool = True
    ) -> NoReturn:
        """Refuses every text.

        Raises:
            RequestError: always.
        """
        raise RequestError(f"{text!r:.60}: this model has no tokenizer, so it takes no text: give lists of token ids")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns no bytes."""
        return b""
