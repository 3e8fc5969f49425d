"""A stand-in tokenizer for models that come without one: bytes in, token numbers out."""

from __future__ import annotations

import tokenizers

from llm_infer.text.gguf_tokenizer import byte_alphabet
from llm_infer.text.tokenizer import Tokenizer


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer whose first 256 ids are the bytes and whose other ids, which no text gives, read `<id>`.

    It is for random weights, whose text means nothing; it has no end-of-sequence token and no chat template.
    """
    vocabulary = {char: index for index, char in enumerate(byte_alphabet())}
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, vocab_size=vocab_size)
