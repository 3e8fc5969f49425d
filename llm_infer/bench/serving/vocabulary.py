"""What random prompts are made of: token ids of common words by the server's tokenizer, or the words themselves."""

from __future__ import annotations

import numpy as np

from llm_infer.bench.serving.client import Client
from llm_infer.bench.serving.response import MalformedResponse

_WORDS = """
    the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not
    what all were we when your can said there use an each which she do how their if will up other about out many then
    them these so some her would make like him into time has look two more write go see number no way could people my
    than first water been call who oil its now find long down day did get come made may part over new sound take only
    little work know place year live me back give most very after thing our just name good sentence man think say great
    where help through much before line right too mean old any same tell boy follow came want show also around form
    three small set put end does another well large must big even such because turn here why ask went men read need
    land different home us move try kind hand picture again change off play spell air away animal house point page
"""
WORDS = _WORDS.split()
"""Common English words; each is one token in most vocabularies."""


class Vocabulary:
    """What random prompts are drawn from. Prompts are arrays of indices until they are sent.

    Attributes:
        ids: token ids that are drawn from; None where prompts are texts of WORDS, about one token each.
    """

    def __init__(self, ids: list[int] | None) -> None:
        self.ids = ids
        self._parts = [str(each).encode() for each in ids] if ids else [each.encode() for each in WORDS]

    @classmethod
    async def of_server(cls, client: Client, model: str) -> Vocabulary:
        """Returns the ids of WORDS by the server's route /tokenize; the words themselves where it has none."""
        body = {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
        try:
            status, answer = await client.fetch("POST", "/tokenize", body)
        except (OSError, MalformedResponse):
            return cls(None)
        ids = answer.get("tokens") if status == 200 and isinstance(answer, dict) else None
        usable = isinstance(ids, list) and all(isinstance(each, int) for each in ids) and len(set(ids)) > 1
        return cls(sorted(set(ids)) if usable and ids else None)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns so many random indices."""
        return rng.integers(0, len(self._parts), count).astype(np.int32)

    def text(self, indices: np.ndarray) -> str:
        """Returns the words at indices of a vocabulary without ids."""
        return " ".join(WORDS[each] for each in indices)

    def encoded(self, indices: np.ndarray) -> bytes:
        """Returns the JSON of a prompt: a list of ids, or a text."""
        parts = self._parts
        if self.ids is None:
            return b'"' + b" ".join([parts[each] for each in indices]) + b'"'
        return b"[" + b",".join([parts[each] for each in indices]) + b"]"
