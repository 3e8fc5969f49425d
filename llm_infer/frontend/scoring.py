"""Scores and embeddings out of finished requests that look at their prompts alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm_infer.base.errors import RequestError
from llm_infer.base.outputs import EmbeddingOutput, RequestOutput, ScoreOutput
from llm_infer.base.plain_values import plain_list
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.results import PooledPrompt
from llm_infer.frontend.tracking import TrackedRequest
from llm_infer.text.continuations import continuation_tokens
from llm_infer.text.detokenizer import IncrementalDetokenizer
from llm_infer.text.tokenizer import Tokenizer

FOR_SCORES = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
FOR_EMBEDDINGS = SamplingParams(temperature=0.0, max_tokens=1)
POOLINGS = ("mean", "last")


def pairs_to_score(
    tokenizer: Tokenizer, contexts: Sequence[str], continuations: Sequence[str]
) -> list[tuple[list[int], int]]:
    """Returns the ids of each context with its continuation, and where the continuation begins.

    Raises:
        RequestError: something else than lists of texts, the lists differ in length, or a continuation has no token.
    """
    contexts, continuations = plain_list(contexts), plain_list(continuations)
    for name, texts in (("contexts", contexts), ("continuations", continuations)):
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"score takes a list of texts as {name}, found {texts!r:.60}")
    if len(contexts) != len(continuations):
        raise RequestError(f"{len(contexts)} contexts for {len(continuations)} continuations: give one for each")
    return [continuation_tokens(tokenizer, *pair) for pair in zip(contexts, continuations, strict=True)]


def score_of(tracked: TrackedRequest, tokenizer: Tokenizer, start: int) -> ScoreOutput:
    """Returns the log-likelihood of a prompt's tokens from `start` on, of a request with FOR_SCORES.

    Raises:
        RequestError: the request failed.
    """
    result = tracked.result()
    _require_success(result)
    assert result.prompt_logprobs is not None
    whole = result.prompt_token_ids
    ids = whole[start:]
    found = [(at or {})[i] for i, at in zip(ids, result.prompt_logprobs[start:], strict=True)]
    logprobs = [one.logprob for one in found]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt=whole[:start], skip_special_tokens=False)
    text = detokenizer.push(ids) + detokenizer.finish()
    return ScoreOutput(sum(logprobs), ids, logprobs, all(one.rank == 1 for one in found), text)


def embedding_of(tracked: TrackedRequest, pooling: str, normalize: bool) -> EmbeddingOutput:
    """Returns the vector of a prompt, of a request that is `pooled`.

    Args:
        tracked: the finished request.
        pooling: one of POOLINGS.
        normalize: scale to length 1.

    Raises:
        RequestError: the request failed.
    """
    _require_success(tracked.result())
    found = tracked.request.prompt_results
    assert isinstance(found, PooledPrompt)
    vector = found.last if pooling == "last" else found.total / np.float32(found.count)
    if normalize:
        vector = vector / np.linalg.norm(vector)
    return EmbeddingOutput(vector.tolist(), list(tracked.request.prompt))


def _require_success(result: RequestOutput) -> None:
    """Raises RequestError with what ended a request that has no result."""
    if (error := result.outputs[0].error) is not None:
        raise RequestError(error)
