"""How the command line shows an answer: its text on standard output as it comes, all about it on standard error after it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llm_infer.base.errors import UserError
from llm_infer.base.outputs import Logprob, StreamChunk
from llm_infer.commands.sampling import CHAT_TOKENS, GENERATE_TOKENS

if TYPE_CHECKING:
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.llm import LLM


def answer(llm: LLM, prompt: Sequence[int], params: SamplingParams) -> Iterator[StreamChunk]:
    """Yields the answer to a prompt as it comes; that of a beam search, known at its end only, in one piece."""
    if params.beam_width is None:
        yield from llm.stream(prompt, params)
        return
    best = llm.generate(prompt, params)[0].outputs[0]
    yield StreamChunk(0, best.text, best.token_ids, best.finish_reason, best.stop_reason, best.logprobs, best.error)


def show_answer(chunks: Iterable[StreamChunk], params: SamplingParams, *, verbose: bool = False) -> None:
    """Streams one answer; then its log-probabilities, if asked for, whether it was cut short, and its speed if `verbose`.

    Raises:
        UserError: the answer could not go on.
    """
    num_tokens, last, logprobs = 0, None, []
    begin, first = time.perf_counter(), 0.0
    try:
        for last in chunks:
            first = first or time.perf_counter()
            write(last.text)
            num_tokens += len(last.token_ids)
            logprobs += last.logprobs or ()
    finally:  # also after Ctrl-C: what comes next begins a line of its own
        if last is not None:
            write("\n")
    if logprobs:
        print(logprob_table(logprobs), file=sys.stderr)
    if verbose and num_tokens:
        print(_speed(num_tokens, first - begin, time.perf_counter() - first), file=sys.stderr)
    if last is not None and last.error is not None:
        raise UserError(last.error)
    if last is not None and last.finish_reason == "length" and (why := _why_cut(num_tokens, params)):
        print(why, file=sys.stderr)


def _why_cut(num_tokens: int, params: SamplingParams) -> str:
    """Says why an answer is cut; nothing where the user has chosen the number of tokens of a plain text."""
    full = params.max_tokens is None or num_tokens < params.max_tokens
    structure = params.structured_outputs
    if not full and structure is None and params.max_tokens not in (GENERATE_TOKENS, CHAT_TOKENS):
        return ""
    limit = "the context is full" if full else f"--max-tokens {params.max_tokens} is reached"
    raising = "give a shorter prompt or raise --max-model-len" if full else "raise --max-tokens (-n)"
    kind = "" if structure is None else "JSON" if structure.kind.startswith("json") else structure.kind
    return f"note: {limit}, so the answer is cut{f' and may be incomplete {kind}' if kind else ''}: {raising}"


def _speed(num_tokens: int, first: float, rest: float) -> str:
    """Says how long the first tokens took, in seconds, and the rest; a beam search has all in one piece."""
    after = num_tokens - 1
    if after and rest > 1e-3:
        return f"{num_tokens} tokens, the first after {first:.2f} s, then {after / rest:.1f} tokens per second"
    return f"{num_tokens} tokens in {first + rest:.2f} s, {num_tokens / (first + rest):.1f} tokens per second"


def logprob_table(found: Sequence[dict[int, Logprob]]) -> str:
    """Writes one line per token: text, log-probability, rank, and those that were more or less likely."""
    rows = []
    for at in found:
        drawn, *others = at.values()
        rows.append((repr(drawn.decoded_token), drawn, others))
    width = max(len("token"), *(len(text) for text, *_ in rows))
    title = f"{'token':<{width}}  logprob    rank" + ("  likely tokens" if any(others for *_, others in rows) else "")
    lines = [
        f"{text:<{width}}  {drawn.logprob:7.3f}  {drawn.rank:6}  "
        + "  ".join(f"{one.decoded_token!r} {one.logprob:.3f}" for one in others)
        for text, drawn, others in rows
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def write(text: str) -> None:
    """Writes text to standard output, at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as with `| head`
            raise SystemExit(0) from None
        raise UserError(f"standard output cannot be written: {error.strerror}") from None
