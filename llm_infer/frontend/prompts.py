"""What a caller gives as prompts, checked and made into what an engine knows: ids, words to avoid, compiled grammars."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict, cast

import numpy as np

from llm_infer.base.errors import RequestError
from llm_infer.base.forks import refuse_lost_child
from llm_infer.base.plain_values import plain, plain_list
from llm_infer.decoding.grammar import CompiledGrammar, GrammarCompiler
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.token_rules import Grammar
from llm_infer.text.tokenizer import Tokenizer


class TextPrompt(TypedDict, total=False):
    """A text, with the `cache_salt` of requests that may share its pages."""

    prompt: Required[str]
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """Token ids; `prompt` is only shown in the result."""

    prompt_token_ids: Required[Sequence[int] | np.ndarray]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | np.ndarray | TextPrompt | TokensPrompt
"""Text, or token ids (a list or an array of integers, of NumPy or another library), or a dictionary with either."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation in OpenAI form: `[{"role": "user", "content": "…"}, …]`."""

KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt (its text, or None, and its ids) with what the engine is to know; see `Engine.add_request`."""

    text: str | None
    ids: list[int]
    params: SamplingParams
    bad_words: list[list[int]]
    grammar: Grammar | None
    priority: int = 0
    cache_salt: str | None = None
    pooled: bool = False
    prompt_only: bool = False


class PromptReader:
    """Makes requests of what callers give. Threads may share it; nothing here waits for a step.

    Args:
        tokenizer: the model's.
        vocab_size: tokens that the model draws from, which may be more than the tokenizer has.
        by_priority: requests wait in the order of their priorities; otherwise they may have none.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, by_priority: bool) -> None:
        self.tokenizer, self._vocab_size, self._by_priority = tokenizer, vocab_size, by_priority
        self._grammars: GrammarCompiler | None = None  # made by the first request that needs it
        self._grammar_lock = threading.RLock()  # a handler may come back to it

    def read(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
        **kinds: bool,
    ) -> list[Asked]:
        """Returns a request for each prompt.

        Args:
            prompts: as of `one_or_many`.
            params: one for each.
            priority: one for all or one for each; smaller runs earlier.
            cache_salt: of the prompts that have none of their own.
            kinds: `pooled` or `prompt_only` of `Asked`.

        Raises:
            RequestError: one of them is not acceptable.
        """
        refuse_lost_child()  # before libraries of tokenizers and grammars, whose threads are not there
        parts = [_parts(prompt) for prompt in prompts]
        priorities = self._priorities(priority, len(prompts))
        salts = [_salt(salt if salt is not None else cache_salt) for _, _, salt in parts]
        if not self.tokenizer.has_text:
            _require_no_text(params)
        ids = [self.tokenizer.encode(cast(str, text)) if ids is None else list(ids) for text, ids, _ in parts]
        # Many prompts have the same parameters: one grammar, and the words once.
        grammars = {id(param): self._grammar(param) for param in params}
        words = {id(param): [w for text in param.bad_words for w in self._spellings(text)] for param in params}
        return [
            Asked(text, token_ids, param, words[id(param)], grammars[id(param)], first, salt, **kinds)
            for (text, *_), token_ids, param, first, salt in zip(parts, ids, params, priorities, salts, strict=True)
        ]

    def _priorities(self, priority: int | Sequence[int] | None, count: int) -> Sequence[int]:
        values = plain_list(plain(0 if priority is None else priority))
        values = values if isinstance(values, list | tuple) else [values] * count
        if not all(type(value) is int for value in values):
            raise RequestError(f"priority={priority!r:.60}: expected a whole number, or one for each prompt")
        if len(values) != count:
            raise RequestError(f"{len(values)} priorities for {count} prompts: give one, or one for each prompt")
        if any(values) and not self._by_priority:
            raise RequestError(f"priority={priority!r:.60}: nothing follows it; make the LLM with policy='priority'")
        return values

    def _spellings(self, text: str) -> list[list[int]]:
        """Returns the token ids of a text within another, as it is and after a space."""
        texts = {text, text if text.startswith(" ") else f" {text}"}
        return [self.tokenizer.encode(each, add_special_tokens=False, begins=False) for each in sorted(texts)]

    def _grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        return None if params.structured_outputs is None else self.grammars().compile(params.structured_outputs)

    def grammars(self) -> GrammarCompiler:
        """Returns what compiles grammars; the first call takes a moment, for a large vocabulary a quarter of a second.

        Raises:
            UserError: the library for it is not installed, or no token ends an output.
        """
        with self._grammar_lock:
            if self._grammars is None:
                tokenizer, vocab_size = self.tokenizer, self._vocab_size
                self._grammars = GrammarCompiler(
                    [tokenizer.token_bytes(i) for i in range(vocab_size)],
                    [i for i in range(vocab_size) if tokenizer.is_special(i)],
                    sorted(tokenizer.eos_token_ids),
                    tokenizer.exact_tokens,
                )
            return self._grammars


def _parts(prompt: Prompt) -> tuple[str | None, list[int] | None, object]:
    """Returns text, ids and salt of a prompt; without ids there is a text, which is to be encoded."""
    if isinstance(prompt, str):
        return prompt, None, None
    if not isinstance(prompt, Mapping):
        return None, cast(list[int], prompt), None
    ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
    if unknown := [key for key in prompt if key not in KEYS]:
        raise RequestError(f"a prompt has the key {unknown[0]!r:.60}: expected {', '.join(KEYS)}")
    if not isinstance(text, str | None) or (ids is None and text is None):
        raise RequestError(
            f"a prompt's text is {text!r:.60}: expected {{'prompt': text}} or {{'prompt_token_ids': ids}}"
        )
    salt = prompt.get("cache_salt")
    return text, None if ids is None else _token_ids(ids), salt


def _token_ids(ids: Any) -> list[int]:
    found = plain_list(ids)
    if not isinstance(found, list | tuple):
        raise RequestError(f"prompt_token_ids={ids!r:.60}: expected a list of whole numbers")
    return list(found)


def _salt(salt: object) -> str | None:
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(f"cache_salt={salt!r:.60}: expected a text that is not empty")
    return salt


def one_or_many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns one prompt or several as a list of prompts.

    Raises:
        RequestError: they are neither.
    """
    if isinstance(prompts, str | Mapping):
        return [cast(Prompt, prompts)]
    found = type(prompts).__name__
    prompts = plain_list(prompts)
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise RequestError(f"expected a prompt or a list of prompts (text or token ids), found {found}")
    if prompts and isinstance(prompts[0], int | float):
        return [prompts]  # type: ignore[list-item]
    return [one_prompt(prompt) for prompt in prompts]


def one_prompt(prompt: Any) -> Prompt:
    """Returns one prompt, with token ids as a list of Python numbers.

    Raises:
        RequestError: it is none.
    """
    if isinstance(prompt, Mapping):
        return cast(Prompt, prompt)
    found = type(prompt).__name__
    prompt = plain_list(prompt)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise RequestError(f"a prompt must be text or token ids, found {found}")
    return prompt


def per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int | None) -> list[SamplingParams]:
    """Returns parameters for each of `count` prompts; with None just as many as are given.

    Raises:
        RequestError: they are no parameters, or not as many.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * (1 if count is None else count)
    if not isinstance(params, Sequence) or not all(isinstance(param, SamplingParams) for param in params):
        raise RequestError(
            f"sampling_params must be SamplingParams, one for all or one per prompt; found {params!r:.60}"
        )
    if count is not None and len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one per prompt")
    return list(params)


def conversations(messages: Messages | Sequence[Messages]) -> Sequence[Messages]:
    """Returns one conversation or several as a list of conversations.

    Raises:
        RequestError: they are neither.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"expected a list of messages with role and content, found {messages!r:.60}")
    return [cast(Messages, messages)] if isinstance(messages[0], Mapping) else cast(Sequence[Messages], messages)


def require_streamable(params: SamplingParams) -> None:
    """Raises RequestError for parameters whose outputs are chosen at the end."""
    if params.num_sequences > params.n:
        name = "best_of" if params.beam_width is None else "beam_width"
        raise RequestError(f"{name}={getattr(params, name)} cannot stream: the best is known at the end only")


def _require_no_text(params: Sequence[SamplingParams]) -> None:
    """Refuses parameters that are about text, for a model without a tokenizer."""
    for name in ("stop", "bad_words", "structured_outputs"):
        if any(getattr(one, name) for one in params):
            raise RequestError(f"{name} needs texts, and this model has no tokenizer: use stop_token_ids and the like")
