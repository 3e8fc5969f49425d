"""From token ids and sampling parameters to a checked request: what a user got wrong is said here, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

import numpy as np

from llm_infer.base.errors import RequestError
from llm_infer.decoding.beam import NUM_CANDIDATES
from llm_infer.decoding.features import StepFeatures, features_of
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.token_rules import Grammar, TokenRules
from llm_infer.scheduler.request import Request


class RequestOptions(TypedDict, total=False):
    """What a request may be given beside its prompt and its sampling parameters.

    Attributes:
        priority: smaller runs earlier under the "priority" policy.
        cache_salt: requests share cached prefixes only with requests of the same salt.
        bad_words: token sequences that are never completed: the tokens of `bad_words` of the parameters.
        grammar: what the output must match: the compiled form of `structured_outputs` of the parameters.
        pooled: collect hidden states of the prompt: `request.prompt_results` is then a `PooledPrompt`.
        prompt_only: nobody wants the token that is drawn, so the prompt may fill the context.
    """

    priority: int
    cache_salt: str | None
    bad_words: Iterable[Sequence[int]]
    grammar: Grammar | None
    pooled: bool
    prompt_only: bool


def make_request(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    request_id: str,
    *,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    seed: tuple[int, int],
    **options: Unpack[RequestOptions],
) -> Request:
    """Returns a request for the scheduler; `seed` is for parameters without one.

    Raises:
        RequestError: the prompt is empty, prompt or parameters hold ids outside the vocabulary, or no token may be drawn.
        TypeError: there is no such option.
    """
    if unknown := options.keys() - RequestOptions.__annotations__.keys():
        raise TypeError(
            f"a request has no option {', '.join(sorted(unknown))}: expected {', '.join(RequestOptions.__annotations__)}"
        )
    params.check_vocabulary(vocab_size)
    prompt = _prompt(prompt_ids, vocab_size)
    if params.seed is None:
        words = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        params = replace(params, seed=int(words[0]))
    _check_beams(params, vocab_size, eos_token_ids)
    pooled = options.get("pooled", False)
    return Request(
        request_id,
        prompt[-(params.truncate_prompt_tokens or 0) :],
        params,
        eos_token_ids=eos_token_ids,
        rules=_rules(params, vocab_size, eos_token_ids, list(options.get("bad_words", ())), options.get("grammar")),
        features=features_of(params, pooled=pooled),
        priority=options.get("priority", 0),
        cache_salt=options.get("cache_salt"),
        prompt_only=pooled or options.get("prompt_only", False),
    )


def _prompt(prompt_ids: Sequence[int], vocab_size: int) -> list[int]:
    flat = not any(hasattr(token, "__len__") or isinstance(token, bool | np.bool_) for token in prompt_ids)
    ids = np.asarray(prompt_ids if flat else ())
    if not flat or (ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu")):
        raise RequestError(f"a prompt of token ids must be a flat list of whole numbers, found {prompt_ids!r:.60}")
    if not ids.size:
        raise RequestError("the prompt is empty: at least one token is needed")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise RequestError(f"the prompt holds token ids outside the vocabulary of {vocab_size} tokens")
    return ids.tolist()


def _check_beams(params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
    """Refuses beams that could all end at once: more of them and of the ids that end one than a step returns tokens for."""
    if params.beam_width is None:
        return
    ends, most = len(params.stop_ids(eos_token_ids)), min(NUM_CANDIDATES, vocab_size)
    if params.beam_width + ends > most:
        raise RequestError(
            f"beam_width={params.beam_width} with {ends} ids that end a sequence: expected at most {most} together; "
            "lower beam_width or give fewer stop_token_ids"
        )


def _rules(
    params: SamplingParams,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    bad_words: Sequence[Sequence[int]],
    grammar: Grammar | None,
) -> TokenRules | None:
    if StepFeatures.MASKED not in features_of(params):
        return None
    if (params.structured_outputs is None) != (grammar is None) or bool(params.bad_words) != bool(bad_words):
        raise RequestError("structured_outputs and bad_words need their compiled forms: grammar and bad_words")
    rules = TokenRules(
        vocab_size,
        allowed=params.allowed_token_ids,
        bad_words=bad_words,
        min_tokens=params.min_tokens,
        stop_ids=params.stop_ids(eos_token_ids),
        grammar=grammar,
        eos_ids=eos_token_ids,
        ignore_eos=params.ignore_eos,
    )
    if (why := rules.why_nothing_starts) is not None:
        raise RequestError(why)
    return rules
