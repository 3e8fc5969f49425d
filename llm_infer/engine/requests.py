"""From token ids and sampling parameters to a checked request: what a user got wrong is said here, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llm_infer.base.errors import RequestError
from llm_infer.decoding.beam import NUM_CANDIDATES, BeamParams
from llm_infer.decoding.features import PLAIN, StepFeatures, features_of
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.token_rules import Grammar, TokenRules
from llm_infer.scheduler.request import Request


def make_request(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    request_id: str,
    *,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    seed: tuple[int, int],
    priority: int = 0,
    cache_salt: str | None = None,
    bad_words: Sequence[Sequence[int]] = (),
    grammar: Grammar | None = None,
    pooled: bool = False,
    prompt_only: bool = False,
) -> Request:
    """A request for the scheduler; arguments as of `Engine.add_request`, `seed` for parameters without one.

    Raises:
        RequestError: the prompt is empty, prompt or parameters hold ids outside the vocabulary, or no token may be drawn.
    """
    params.check_vocabulary(vocab_size)
    prompt = _prompt(prompt_ids, vocab_size)
    if params.seed is None:
        words = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        params = replace(params, seed=int(words[0]))
    # Once a structure is complete its end is all that can follow, so there is nothing to go on to; see TokenRules.
    ignore_eos = params.ignore_eos and grammar is None
    request = Request(
        request_id=request_id,
        prompt=prompt[-(params.truncate_prompt_tokens or 0) :],
        max_tokens=params.max_tokens,
        eos_token_ids=eos_token_ids,
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=ignore_eos,
        n=params.num_sequences,
        min_tokens=params.min_tokens,
        priority=priority,
        cache_salt=cache_salt,
        sampling=params,
        # Rules that look at the tokens before would have to follow every proposal.
        speculate=features_of(params, pooled=pooled) == PLAIN,
        beams=_beams(params, vocab_size, eos_token_ids),
        whole_prompt=pooled or params.prompt_logprobs is not None,
        prompt_only=pooled or prompt_only,
        pooled=pooled,
    )
    request.rules = rules = _rules(request, params, vocab_size, bad_words, grammar)
    request.stepwise = rules is not None and rules.needs_last_token
    return request


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


def _beams(params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]) -> BeamParams | None:
    if params.beam_width is None:
        return None
    ends = len({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
    most = min(NUM_CANDIDATES, vocab_size)
    if params.beam_width + ends > most:
        raise RequestError(
            f"beam_width={params.beam_width} with {ends} ids that end a sequence: expected at most {most} together; "
            "lower beam_width or give fewer stop_token_ids"
        )
    return BeamParams(params.beam_width, params.length_penalty, params.early_stopping)


def _rules(
    request: Request,
    params: SamplingParams,
    vocab_size: int,
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
        stop_ids=request.stop_token_ids | (frozenset() if request.ignore_eos else request.eos_token_ids),
        grammar=grammar,
        eos_ids=request.eos_token_ids,
        ignore_eos=params.ignore_eos,
    )
    if (why := rules.why_nothing_starts) is not None:
        raise RequestError(why)
    return rules
