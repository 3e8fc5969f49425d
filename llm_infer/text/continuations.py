"""Finds the tokens of a text that belong to a continuation, for scoring it."""

from __future__ import annotations

from llm_infer.base.errors import RequestError
from llm_infer.text.tokenizer import Tokenizer


def continuation_tokens(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Returns the token ids of both texts together, and the index of the first token that is scored.

    White space at the end of the context counts towards the continuation, as in evaluation harnesses: models have it at the
    beginning of a token. Where the context ends inside a word, a token may still cross the border: scoring begins at the
    first token that differs from those of the context alone. Where no token stands before it, the model's first token
    (beginning or end of sequence) does.

    Raises:
        RequestError: the continuation has no token of its own, or the model has no first token and one is needed.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    alone = tokenizer.encode(stripped)
    start = 0
    while start < min(len(whole), len(alone)) and whole[start] == alone[start]:
        start += 1
    if not continuation or start == len(whole):
        raise RequestError(f"the continuation {continuation!r:.60} has no token of its own")
    if start > 0:
        return whole, start
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if first is None:
        raise RequestError("this model has no first token to score a text without context: give a context")
    return [first, *whole], 1
