"""How the command line shows an answer: its text on standard output as it comes, all about it on standard error after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llm_infer.base.errors import UserError
from llm_infer.base.outputs import Logprob, StreamChunk

if TYPE_CHECKING:
    from llm_infer.decoding.sampling_params import SamplingParams


def show_answer(chunks: Iterable[StreamChunk], params: SamplingParams) -> None:
    """Streams one answer; then its log-probabilities, if asked for, and whether it was cut short.

    Raises:
        UserError: the answer could not go on.
    """
    num_tokens, last, logprobs = 0, None, []
    try:
        for last in chunks:
            write(last.text)
            num_tokens += len(last.token_ids)
            logprobs += last.logprobs or ()
    finally:  # also after Ctrl-C: what comes next begins a line of its own
        if last is not None:
            write("\n")
    if logprobs:
        print(logprob_table(logprobs), file=sys.stderr)
    if last is not None and last.error is not None:
        raise UserError(last.error)
    if last is not None and last.finish_reason == "length" and params.structured_outputs is not None:
        full = params.max_tokens is None or num_tokens < params.max_tokens
        limit = "the context is full" if full else f"--max-tokens {params.max_tokens} is reached"
        raising = "give a shorter prompt or raise --max-model-len" if full else "raise --max-tokens"
        kind = "JSON" if params.structured_outputs.kind.startswith("json") else params.structured_outputs.kind
        print(f"note: {limit}, so the answer is cut and may be incomplete {kind}: {raising}", file=sys.stderr)


def logprob_table(found: Sequence[dict[int, Logprob]]) -> str:
    """One line per token: text, log-probability, rank, and those that were more or less likely."""
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
    """Text to standard output, at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as with `| head`
            raise SystemExit(0) from None
        raise UserError(f"standard output cannot be written: {error.strerror}") from None
