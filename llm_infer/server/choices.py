"""Pieces of answers: log-probabilities in OpenAI's two forms, usage, and news of a job gathered by choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_infer.base.outputs import Logprob, RequestOutput
from llm_infer.server.engine_thread import STOPPING, Update
from llm_infer.server.errors import ApiError, bad_request
from llm_infer.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""

Position = dict[int, Logprob] | None


class TokenTexts:
    """Texts of tokens as answers show them.

    Args:
        tokenizer: the model's.
        as_ids: write "token:ID", which tells apart tokens that are parts of characters.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self.tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token: int) -> str:
        """Returns the text of a token."""
        return f"token:{token}" if self._as_ids else self.bytes(token).decode("utf-8", "replace")

    def bytes(self, token: int) -> bytes:
        """Returns the bytes of a token."""
        return self.tokenizer.token_bytes(token)

    def chat(self, ids: Sequence[int], positions: Sequence[Position], count: int) -> dict[str, Any]:
        """Returns the log-probabilities of a message: of each token, and of the `count` most likely ones."""
        content = []
        for token, found in zip(ids, positions, strict=True):
            found = found or {}
            tops = [self._chat_token(each, one) for each, one in found.items() if one.rank <= count]
            content.append({**self._chat_token(token, found.get(token)), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _chat_token(self, token: int, found: Logprob | None) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": _finite(found), "bytes": list(self.bytes(token))}

    def completion(self, ids: Sequence[int], positions: Sequence[Position], offset: int) -> dict[str, Any]:
        """Returns the log-probabilities of a completion whose text begins `offset` characters into the answer."""
        texts = [self.text(token) for token in ids]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [
                None if at is None else _finite(at.get(token)) for token, at in zip(ids, positions, strict=True)
            ],
            "top_logprobs": [
                None if at is None else {self.text(each): _finite(one) for each, one in at.items()} for at in positions
            ],
            "text_offset": offsets,
        }

    def prompt(self, positions: Sequence[Position]) -> list[dict[str, Any] | None]:
        """Returns the log-probabilities of a prompt in vLLM's form: by id, with rank and text."""
        return [
            None
            if at is None
            else {
                str(token): {"logprob": _finite(one), "rank": one.rank, "decoded_token": self.text(token)}
                for token, one in at.items()
            }
            for at in positions
        ]


def _finite(found: Logprob | None) -> float:
    return LOWEST if found is None or not math.isfinite(found.logprob) else found.logprob


def usage(prompt_tokens: int, new_tokens: int, cached: int = 0) -> dict[str, Any]:
    """Returns OpenAI's counts of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def usage_of(results: Iterable[RequestOutput], *, new_tokens: int | None = None) -> dict[str, Any]:
    """Returns the counts of finished requests."""
    results = list(results)
    new = sum(len(output.token_ids) for one in results for output in one.outputs) if new_tokens is None else new_tokens
    return usage(sum(len(one.prompt_token_ids) for one in results), new, sum(one.num_cached_tokens for one in results))


@dataclass(slots=True)
class Gathered:
    """What is new of one choice since the last frame."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def gathered(updates: Iterable[Update], n: int) -> dict[int, Gathered]:
    """Returns what is new by choice, of jobs whose prompts have `n` choices each.

    Raises:
        ApiError: a choice ended with an error.
    """
    found: dict[int, Gathered] = {}
    for update in updates:
        for prompt, chunk in update.chunks:
            one = found.setdefault(prompt * n + chunk.index, Gathered())
            one.text += chunk.text
            one.token_ids += chunk.token_ids
            one.positions += chunk.logprobs or []
            if chunk.finish_reason is not None:
                if chunk.finish_reason == "error" and update.error is None:
                    raise bad_request(chunk.error or "no token could follow", None, "generation_failed")
                one.finish_reason, one.stop_reason = chunk.finish_reason, chunk.stop_reason
        require_success(update)
    return found


def require_success(update: Update) -> None:
    """Raises ApiError if a job ended with an error, or one of its samples did."""
    if update.error is not None:
        if update.error == STOPPING:
            raise ApiError(503, update.error, code="server_stopping")
        if update.fault:
            raise ApiError(500, update.error, code="engine_error")
        too_long = "max_model_len" in update.error
        raise bad_request(update.error, None, "context_length_exceeded" if too_long else "invalid_value")
    for result in update.results or ():
        if isinstance(result, RequestOutput):
            for output in result.outputs:
                if output.finish_reason == "error":
                    raise bad_request(output.error or "no token could follow", None, "generation_failed")
