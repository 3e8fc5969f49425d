"""What is sent: turns of conversations, and the bodies of their requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_infer.bench.serving.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Turn:
    """One question.

    Attributes:
        prompt: a text, or indices into the vocabulary.
        input_tokens: length of the prompt, where it is known before it is sent.
        output_tokens: most tokens of the answer.
    """

    prompt: str | np.ndarray
    output_tokens: int
    input_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow each other: each is sent with what was said before, when the answer before it is there.

    Attributes:
        turns: one or more.
        at: seconds after the start of the load when the first is sent; None leaves that to the request rate.
    """

    turns: Sequence[Turn]
    at: float | None = None


@dataclass(frozen=True)
class Form:
    """How requests look.

    Attributes:
        model: name of the model.
        chat: whether messages are sent, not prompts.
        stream: whether answers are streamed.
        vocabulary: what indices stand for.
        fields: further fields of the body.
    """

    model: str
    chat: bool
    stream: bool
    vocabulary: Vocabulary
    fields: dict[str, Any] = field(default_factory=dict)

    def first(self, turn: Turn) -> bytes:
        """Returns the body of a conversation's first request."""
        if self.chat or isinstance(turn.prompt, str):
            return self._body(turn, None, ())
        return self._body(turn, self.vocabulary.encoded(turn.prompt), ())

    def next(self, turn: Turn, said: Sequence[tuple[str, str]]) -> bytes:
        """Returns the body of a later request, after questions and their answers."""
        return self._body(turn, None, said)

    def question(self, turn: Turn) -> str:
        """Returns a turn's text."""
        return turn.prompt if isinstance(turn.prompt, str) else self.vocabulary.text(turn.prompt)

    def _body(self, turn: Turn, prompt: bytes | None, said: Sequence[tuple[str, str]]) -> bytes:
        name = "messages" if self.chat else "prompt"
        if prompt is None and self.chat:
            messages = []
            for asked, answer in said:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            prompt = json.dumps([*messages, {"role": "user", "content": self.question(turn)}]).encode()
        elif prompt is None:
            texts = [f"{asked}{answer}\n" for asked, answer in said]
            prompt = json.dumps("".join(texts) + self.question(turn)).encode()
        rest: dict[str, Any] = {"model": self.model, "max_tokens": turn.output_tokens, "stream": self.stream}
        if self.stream:
            rest["stream_options"] = {"include_usage": True}
        rest |= self.fields
        return b'{"%s":%s,%s' % (name.encode(), prompt, json.dumps(rest).encode()[1:])
