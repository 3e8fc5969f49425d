"""/v1/embeddings: vectors of texts."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np

from llm_infer.base.outputs import EmbeddingOutput
from llm_infer.frontend.prompts import Asked
from llm_infer.frontend.scoring import FOR_EMBEDDINGS
from llm_infer.server.completions import as_prompts, salted
from llm_infer.server.exchange import Exchange
from llm_infer.server.generation import results_of
from llm_infer.server.protocol import EmbeddingRequest


async def embeddings(exchange: Exchange, data: bytes) -> None:
    """Answers a request for embeddings: the mean of the last hidden states, of length 1."""
    body = await exchange.parsed(EmbeddingRequest, data)
    service = exchange.service
    service.require_ready()
    prompts, salt = as_prompts(body.input), salted(exchange, None)
    params = replace(FOR_EMBEDDINGS, truncate_prompt_tokens=body.truncate_prompt_tokens)
    service.admit(len(prompts))

    def read() -> list[Asked]:
        return service.prompts.read(prompts, [params] * len(prompts), cache_salt=salt, pooled=True)

    asked = await service.in_worker(read)
    async with service.running(asked, stream=False, kind="embed") as ticket:
        found = await results_of(ticket, EmbeddingOutput)
    shown = _base64 if body.encoding_format == "base64" else list
    counts = {"prompt_tokens": sum(len(one.prompt_token_ids) for one in found)}
    await exchange.reply(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": shown(one.embedding)} for i, one in enumerate(found)
            ],
            "model": body.model or service.names[0],
            "usage": {**counts, "total_tokens": counts["prompt_tokens"]},
        }
    )


def _base64(vector: list[float]) -> Any:
    """Returns the numbers as little-endian float32, in base64."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")
